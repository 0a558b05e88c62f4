"""What a level does on tokens, looked at piece by piece."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from nestopt.core.associative import AssociativeMemory
from nestopt.core.device import constants
from nestopt.core.gates import bind, gates_of, per_head
from nestopt.core.level import Level
from nestopt.core.pending import PENDING
from nestopt.core.token_form import TokenForm
from nestopt.core.tree import State, leaves
from nestopt.ops.run import run_form

PIECE = 64
"""Tokens of a piece, where the level has no chunks of its own."""

QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)

Stats = dict[str, Any]


def run_in_pieces(
    form: TokenForm,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Mapping[str, Tensor],
    state: State,
    *,
    mask: Tensor | None,
    learn: bool,
    **options: Any,
) -> tuple[Tensor, State, Stats]:
    """Do as `run_form`, a piece of tokens at a time, with what is to be seen of each: see `SequenceMemory.forward`.

    A piece is a chunk of the level; the first is what is left of one that was begun. Without chunks it is 64 tokens.
    """
    level, length, size = form.level, q.shape[1], form.chunk if form.chunk > 1 else PIECE
    begun = form.pending(state) if learn else 0
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
        y, state = run_form(form, q[:, part], k[:, part], v[:, part], here, state, mask=live, learn=learn, **options)
        ys.append(y)
    stats: Stats = {"memory_norm": torch.stack(norms, dim=-1)}
    if surprises:
        stats["surprise"] = torch.stack(surprises, dim=-1)
    stats["gates"] = {path: torch.stack(found, dim=-1) for path, found in quantiles.items()}
    return torch.cat(ys, dim=1), state, stats


def memory_norm(level: Level, state: State) -> Tensor:
    """Return `[B, H]`: the norm of all numbers of the level's memory; where it is no associative memory, of all its
    state.

    Of that, what no token changes and tokens that are not written yet are left out.
    """
    memory = state["level"]["memory"] if isinstance(level, AssociativeMemory) else state["level"]
    count = state["step"]
    floating = [
        leaf
        for path, leaf in leaves(memory)
        if leaf.is_floating_point()
        and leaf.shape[:2] == count.shape
        and path.split(".")[0] not in level.constant_keys
        and PENDING not in path.split(".")
    ]
    total = torch.zeros(count.shape, device=count.device)
    for leaf in floating:
        leaf = leaf.to(torch.promote_types(leaf.dtype, torch.float32))
        total = total + leaf.flatten(2).square().sum(-1) if leaf.ndim > 2 else total + leaf.square()
    return total.sqrt()


def errs(level: Level) -> bool:
    """Return whether `level` learns by the errors of a memory: one that keeps its pairs as they are makes none."""
    return isinstance(level, AssociativeMemory) and not level.appends


def _surprise(
    level: Level, k: Tensor, v: Tensor, gates: Mapping[str, Tensor], state: State, live: Tensor | None
) -> Tensor:
    """`[B, H]`: the root mean square of M(φ(k)) - v over the live tokens, with the memory as it is in `state`."""
    dtype = torch.promote_types(v.dtype, torch.float32)

    def error(theta: State, k: Tensor, v: Tensor, gates: Mapping[str, Tensor]) -> Tensor:
        bound = bind(level, gates)
        assert isinstance(bound, AssociativeMemory)
        read = bound._answer if getattr(bound, "normalizer", False) else bound.memory.read
        return (read(theta, bound.features(k)) - v).square().mean(-1)

    over_tokens = vmap(error, in_dims=(None, 0, 0, 0))
    k, v = (x.to(dtype).transpose(1, 2) for x in (k, v))
    # all others are at their initial value
    values = {**per_head(gates_of(level), v), **{path: gate.to(dtype).transpose(1, 2) for path, gate in gates.items()}}
    squares = vmap(vmap(over_tokens))(state["level"]["memory"], k, v, values)
    seen = squares.isfinite() if live is None else squares.isfinite() & live[:, None]
    total = torch.where(seen, squares, 0).sum(-1)
    return (total / seen.sum(-1).clamp_min(1)).sqrt()


def _quantiles(gate: Tensor, live: Tensor | None) -> Tensor:
    """Return `[5, H]` of a gate `[B, T, H]` over the batch and its live tokens; NaN where there are none."""
    if live is not None:
        gate = gate.masked_fill(~live[..., None], torch.nan)
    at = constants(QUANTILES, gate)
    return torch.nanquantile(gate.flatten(0, 1), at, dim=0)
