"""A long text read in segments, each of which is run again in the backward pass: only states between them are kept."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nestopt.core.tree import State, leaves, replaced, tree_map

Run = Callable[[State, slice], tuple[Tensor, State]]
"""Reads the tokens of a segment from a state: the residual stream `[B, n, dim]`, and the state after them."""


def in_segments(run: Run, state: State, length: int, size: int) -> tuple[Tensor, State]:
    """Read `length` tokens in segments of `size`, and recompute each in the backward pass."""
    found = []
    for first in range(0, length, size):
        x, state = _again(run, state, slice(first, min(first + size, length)))
        found.append(x)
    return torch.cat(found, dim=1), state


def _again(run: Run, state: State, part: slice) -> tuple[Tensor, State]:
    names, values = zip(*leaves(state), strict=True)
    none = torch.empty(0)
    form: list[State] = []  # without its tensors, which would live as long as the graph

    def flat_run(*flat: Tensor) -> tuple[Tensor, ...]:
        x, new = run(replaced(state, dict(zip(names, flat, strict=True))), part)
        form[:] = [tree_map(lambda _: none, new)]
        return x, *(leaf for _, leaf in leaves(new))

    x, *flat = checkpoint(flat_run, *values, use_reentrant=False, preserve_rng_state=False)
    return x, replaced(form[0], dict(zip((name for name, _ in leaves(form[0])), flat, strict=True)))
