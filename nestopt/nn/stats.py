"""What a level does on tokens, looked at piece by piece."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from nestopt.core.associative import AssociativeMemory
from nestopt.core.device import constants
from nestopt.core.gates import bind, per_head
from nestopt.core.level import Level
from nestopt.core.memories import Memory
from nestopt.core.token_reference import PENDING
from nestopt.core.tree import State, leaves
from nestopt.ops.dispatch import run

PIECE = 64
"""Tokens of a piece, where the level has no chunks of its own."""

QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)

Stats = dict[str, Any]


def run_in_pieces(
    level: Level,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    gates: Mapping[str, Tensor],
    state: State,
    mask: Tensor | None,
    learn: bool = True,
    **options: Any,
) -> tuple[Tensor, State, Stats]:
    """`nestopt.ops.run`, a piece of tokens at a time, with what is to be seen of each: see `SequenceMemory.forward`.

    A piece is a chunk of the level; the first is what is left of one that was begun. Without chunks it is 64 tokens.
    """
    length, size = q.shape[1], level.span if level.span > 1 else PIECE
    begun = _begun(level, state) if learn else 0
    sizes = [min(size - begun, length)]
    sizes += [min(size, length - first) for first in range(sizes[0], length, size)]
    ys, norms, surprises = [], [], []
    quantiles: dict[str, list[Tensor]] = {path: [] for path in gates}
    first = 0
    for count in sizes:
        part = slice(first, first + count)
        first += count
        here = {path: gate[:, part] for path, gate in gates.items()}
        live = None if mask is None else mask[:, part]
        with torch.no_grad():
            norms.append(memory_norm(level, state))
            if errs(level):
                surprises.append(_surprise(level, k[:, part], v[:, part], here, state, live))
            for path, found in quantiles.items():
                found.append(_quantiles(here[path], live))
        tokens = (x[:, part] for x in (q, k, v))
        y, state = run(level, *tokens, gates=here, state=state, mask=live, learn=learn, **options)
        ys.append(y)
    stats: Stats = {"memory_norm": torch.stack(norms, dim=-1)}
    if surprises:
        stats["surprise"] = torch.stack(surprises, dim=-1)
    stats["gates"] = {path: torch.stack(found, dim=-1) for path, found in quantiles.items()}
    return torch.cat(ys, dim=1), state, stats


def _begun(level: Level, state: State) -> int:
    """How many tokens of a chunk that is not over the state has."""
    if not level.keeps_pending:
        return state[PENDING]["k"].shape[2] if PENDING in state else 0
    counts = [leaf.shape[2] for path, leaf in leaves(state["level"]) if path.endswith(f"{PENDING}.live")]
    return max(counts) % level.span


def memory_norm(level: Level, state: State) -> Tensor:
    """`[B, H]`: the norm of all numbers of the level's memory; where it is no associative memory, of all its state.

    Of that, what no token changes and tokens that are not written yet are left out.
    """
    memory = state["level"]["memory"] if isinstance(level, AssociativeMemory) else state["level"]
    count = state["step"]
    floating = [
        leaf
        for path, leaf in leaves(memory)
        if leaf.is_floating_point()
        and leaf.shape[:2] == count.shape
        and path.split(".")[0] not in level.fixed
        and PENDING not in path.split(".")
    ]
    total = torch.zeros(count.shape, device=count.device)
    for leaf in floating:
        leaf = leaf.to(torch.promote_types(leaf.dtype, torch.float32))
        total = total + leaf.flatten(2).square().sum(-1) if leaf.ndim > 2 else total + leaf.square()
    return total.sqrt()


def errs(level: Level) -> bool:
    """Whether `level` learns by the errors of a memory: one that keeps its pairs as they are makes none."""
    return isinstance(level, AssociativeMemory) and type(level.memory).append is Memory.append


def _surprise(
    level: Level, k: Tensor, v: Tensor, gates: Mapping[str, Tensor], state: State, live: Tensor | None
) -> Tensor:
    """`[B, H]`: the root mean square of M(φ(k)) - v over the live tokens, with the memory as it is in `state`."""
    dtype = torch.promote_types(v.dtype, torch.float32)

    def error(theta: State, k: Tensor, v: Tensor, gates: Mapping[str, Tensor]) -> Tensor:
        bound = bind(level, gates)
        assert isinstance(bound, AssociativeMemory)
        return (bound.memory.read(theta, bound.features(k)) - v).square().mean(-1)

    over_tokens = vmap(error, in_dims=(None, 0, 0, 0))
    k, v = (x.to(dtype).transpose(1, 2) for x in (k, v))
    every = {**per_head(level, v.transpose(1, 2)), **gates}  # all others are at their initial value
    values = {path: gate.to(dtype).transpose(1, 2) for path, gate in every.items()}
    squares = vmap(vmap(over_tokens))(state["level"]["memory"], k, v, values)
    seen = squares.isfinite() if live is None else squares.isfinite() & live[:, None]
    total = torch.where(seen, squares, 0).sum(-1)
    return (total / seen.sum(-1).clamp_min(1)).sqrt()


def _quantiles(gate: Tensor, live: Tensor | None) -> Tensor:
    """`[5, H]` of a gate `[B, T, H]` over the batch and its live tokens; NaN where there are none."""
    if live is not None:
        gate = gate.masked_fill(~live[..., None], torch.nan)
    at = constants(QUANTILES, gate)
    return torch.nanquantile(gate.flatten(0, 1), at, dim=0)
