"""Sizes of tensors whose squares may be out of range: float32 squares to infinity above 1e19, and to 0 below 1e-23."""

from __future__ import annotations

import math

import torch
from torch import Tensor

EXPONENTS = {
    torch.float64: (torch.int64, 0x7FF0000000000000),
    torch.float32: (torch.int32, 0x7F800000),
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float16: (torch.int16, 0x7C00),
}
"""Of each dtype, the whole numbers of its size, and the bits of its exponent in them: those of a power of 2."""


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


def magnitude(x: Tensor, dim: tuple[int, ...] | None = None) -> Tensor:
    """Return the power of 2 that is at most `largest`, and over half of it: a division by it rounds nothing."""
    size = largest(x, dim)
    whole, exponent = EXPONENTS[size.dtype]
    return (size.view(whole) & exponent).view(size.dtype)


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
