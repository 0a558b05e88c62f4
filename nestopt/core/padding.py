"""Tokens moved behind padding, in their order, so that the last tokens before one are the last places before its."""

from __future__ import annotations

import torch
from torch import Tensor


def places(live: Tensor) -> Tensor:
    """Return `[.., T]`: to which place each token goes, where all that are not `live` come first."""
    count = live.long()
    dead = 1 - count
    return torch.where(live, dead.sum(-1, keepdim=True) + count.cumsum(-1), dead.cumsum(-1)) - 1


def to_places(x: Tensor, place: Tensor) -> Tensor:
    """Return `[B, H, T, D]` with each token at its place, `[B, H or 1, T]`."""
    return torch.zeros_like(x).scatter(2, place[..., None].expand_as(x), x)


def from_places(x: Tensor, place: Tensor) -> Tensor:
    """Return what stands at `place` `[B, H or 1, n]` of `[B, H, T, D]`: `[B, H, n, D]`."""
    return x.gather(2, place[..., None].expand(*x.shape[:2], place.shape[-1], x.shape[-1]))
