"""Sizes of tensors whose squares may be out of range: float32 squares to infinity above 1e19, and to 0 below 1e-23."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def largest(x: Tensor, dim: tuple[int, ...] | None = None) -> Tensor:
    """Return the largest absolute value over `dim` (default: all), kept above 0; no gradient passes through it."""
    if not x.numel():
        return x.new_ones(())
    x, keep = x.detach(), dim is not None
    dim = tuple(range(x.ndim)) if dim is None else dim
    if x.device.type == "cpu":  # where the norm below takes 40 times as long
        norm = torch.maximum(x.amax(dim, keep), -x.amin(dim, keep))
    else:
        norm = torch.linalg.vector_norm(x, math.inf, dim, keepdim=keep)
    return norm.clamp_min(torch.finfo(x.dtype).tiny)


def length(x: Tensor, dim: tuple[int, ...] | None = None) -> Tensor:
    """Return the Euclidean norm over `dim` (default: all), kept above 0, of numbers of any size."""
    size = largest(x, dim)
    norm = torch.linalg.vector_norm(x / size, dim=dim, keepdim=dim is not None)
    return (norm * size).clamp_min(torch.finfo(x.dtype).tiny)


def root_mean_square(x: Tensor, dim: tuple[int, ...] | None = None) -> Tensor:
    """Return the root mean square over `dim` (default: all), kept above 0, of numbers of any size."""
    norm = length(x, dim)
    return (norm / math.sqrt(max(1, x.numel() // norm.numel()))).clamp_min(torch.finfo(x.dtype).tiny)


def square_limit(x: Tensor) -> float:
    """Return a size whose square is far below what the dtype of `x` holds: 2**50 in float32."""
    return math.sqrt(torch.finfo(x.dtype).max) / 2**14
