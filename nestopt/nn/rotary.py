"""Positions of tokens, by rotation of queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary(x: Tensor, positions: Tensor, base: float) -> Tensor:
    r"""Rotate pairs of entries by angles that grow with the position (Su et al. 2021).

    Entries i and i + D/2 turn by $\mathrm{position} \cdot \mathrm{base}^{-2i/D}$, so that the product of a query and a
    key so turned depends on their distance only. An odd last entry stays as it is.

    Args:
        x: `[B, T, H, D]`.
        positions: `[B, T]`, whole numbers.
        base: ratio of the longest period and the shortest; more than 1.
    """
    half = x.shape[-1] // 2
    # float32 at least: positions are counted, and bfloat16 can't count beyond 256
    dtype = torch.promote_types(x.dtype, torch.float32)
    speeds = base ** (-torch.arange(half, dtype=dtype, device=x.device) / max(half, 1))
    angles = positions[..., None, None].to(dtype) * speeds
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], dim=-1)
