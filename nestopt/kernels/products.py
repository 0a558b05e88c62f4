"""Products of per-token decays between any two tokens of a chunk, as sums of logarithms."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def logarithm(decay: Tensor) -> Tensor:
    """log(decay), finite: a decay below the least normal number of its dtype, 0 among them, counts as that number."""
    return decay.clamp_min(torch.finfo(decay.dtype).tiny).log()


def products(log_decay: Tensor) -> tuple[Tensor, Tensor]:
    r"""Γ `[.., C, C]` and γ `[.., C]` of logarithms `[.., C]`.

    $\Gamma_{ts} = \prod_{s<r\le t} a_r$ for s <= t, else 0: what is left at t of what was written at s; and
    $\gamma_t = \prod_{r\le t} a_r$: what is left of the chunk's start. One below the least normal number of its dtype
    counts as that: exp is slow where its result has no digits.
    """
    between, since = _Products.apply(log_decay)
    return between, since


class _Products(torch.autograd.Function):
    """Differences of one running sum of logarithms would cancel, and lose most digits behind a decay near 0.

    So there are two sums: of the logarithms on a coarse grid, on which every sum and difference is exact, and of the
    small rest. Autograd would take the same differences of gradients; here each pair is counted where it belongs.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(log_decay: Tensor) -> tuple[Tensor, Tensor]:
        size = log_decay.shape[-1]
        least = math.log(torch.finfo(log_decay.dtype).tiny)
        grid = _on_grid(log_decay)
        coarse, fine = grid.cumsum(-1), (log_decay - grid).cumsum(-1)
        past = log_decay.new_ones(size, size).tril()
        steps = (coarse[..., :, None] - coarse[..., None, :]).clamp_min(least) * past
        between = (steps + fine[..., :, None] - fine[..., None, :]).exp() * past
        return between, (coarse.clamp_min(least) + fine).exp()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*output)

    @staticmethod
    def backward(ctx: Any, to_between: Tensor, to_since: Tensor) -> Tensor:
        between, since = ctx.saved_tensors
        past = between.new_ones(between.shape[-2:]).tril(-1)
        # the decay at r is in all pairs of a time t >= r and a write s < r
        later = past.mT + torch.eye(past.shape[-1], dtype=past.dtype, device=past.device)
        pairs = later @ (to_between * between)
        return (pairs * past).sum(-1) + (later @ (to_since * since)[..., None])[..., 0]


def _on_grid(logarithms: Tensor) -> Tensor:
    """Return `[.., C]` rounded so that sums of C of them are exact in their dtype."""
    numbers = torch.finfo(logarithms.dtype)
    largest = logarithms.shape[-1] * -math.log(numbers.tiny)
    step = 2.0 ** math.ceil(math.log2(largest * numbers.eps))
    return (logarithms / step).round() * step


def shifted(x: Tensor, first: float = 0.0) -> Tensor:
    """Return `[.., C, n]` with its rows moved down by one: row t holds what stood at t - 1; the first is filled."""
    return torch.nn.functional.pad(x[..., :-1, :], (0, 0, 1, 0), value=first)
