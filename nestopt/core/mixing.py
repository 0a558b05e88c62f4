"""Arithmetic with numbers that may be tensors: gates, learned numbers, and schedules where no value is looked at."""

from __future__ import annotations

import torch
from torch import Tensor

from nestopt.core.part import Number


def mixed(old: Tensor, new: Tensor, share: Number) -> Tensor:
    """Return old + share · (new - old)."""
    return old + share * (new - old) if isinstance(share, Tensor) else torch.lerp(old, new, share)  # type: ignore[arg-type]


def plus(a: Tensor, b: Tensor, scale: Number) -> Tensor:
    """Return a + scale · b, rounded once where it can be."""
    return a + scale * b if isinstance(scale, Tensor) else torch.add(a, b, alpha=scale)  # type: ignore[arg-type]


def plus_square(a: Tensor, b: Tensor, scale: Number) -> Tensor:
    """Return a + scale · b², rounded once where it can be."""
    return a + scale * (b * b) if isinstance(scale, Tensor) else a.addcmul(b, b, value=scale)  # type: ignore[arg-type]
