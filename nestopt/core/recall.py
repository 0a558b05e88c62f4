"""Reading a level's memory on tokens, and writing nothing."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.func import vmap

from nestopt.core.associative import AssociativeMemory
from nestopt.core.gates import bind, gates_of, idle_gate
from nestopt.core.level import Level
from nestopt.core.memories import Matrix, Mlp, Theta, Window
from nestopt.core.outputs import Plain
from nestopt.core.pending import COUNT, PENDING, count_of
from nestopt.core.signal import Signal
from nestopt.core.token_batch import TokenBatch
from nestopt.core.tree import State, leaves

AT_ONCE = 64
"""Tokens asked together: a level that is no memory of pairs makes a direction for each."""


def recalled(level: Level, tokens: TokenBatch, gates: Mapping[str, Tensor], state: State) -> Tensor:
    """Answer the queries of `tokens` as `state` holds the level's memory: `[B, H, T, D_v]`.

    Each token is asked as if it came next. A memory of pairs is read as it is after the last token that it has seen
    (those of a chunk that is not over, too), or, with `read="chunk"`, as that chunk found it. Any other level is asked
    by its `token_read`. `gates` are `[B, H, T]`, by dotted path; one that is missing is at its initial value.
    """
    pending = {name: x for name, x in state.get(PENDING, {}).items() if name != COUNT}
    begun = bool(pending) and pending["k"].shape[2] > 0
    if isinstance(level, AssociativeMemory):
        theta = state["level"]["memory"]
        if begun and level.read != "chunk":
            theta = _after_pending(level, {**state, PENDING: pending})
        return answers(level, tokens.q, theta, gates)
    dim_v = tokens.v.shape[-1]

    def one(q: Tensor, now: State, memory: State, pending: State, step: Tensor, count: Tensor) -> Tensor:
        if begun:
            return _answered_next(level, q, now, memory, pending, step, count)
        return bind(level, now).token_read(q, dim_v, memory, Signal(step=step + 1))

    missing = {path: gate for path, gate in gates_of(level).items() if path not in gates}
    every = {**gates, **{path: idle_gate(gate, tokens.k) for path, gate in missing.items()}}
    of_heads = vmap(vmap(one))
    of_tokens = vmap(of_heads, in_dims=(2, 2, None, None, None, None), out_dims=2, chunk_size=AT_ONCE)
    step = state["step"]
    count = count_of(state[PENDING])[:, None].expand_as(step) if begun else step
    return of_tokens(tokens.q, every, state["level"], pending, step, count)


def answers(level: AssociativeMemory, q: Tensor, theta: Theta, gates: Mapping[str, Tensor]) -> Tensor:
    """Return what a memory with parameters `theta` `[B, H, ..]` answers to q `[B, H, T, D_k]`."""
    plain = type(level)._answer is AssociativeMemory._answer or not getattr(level, "normalizer", True)
    built_in = plain and type(level.memory) in (Matrix, Mlp, Window) and type(level.output) is Plain
    if built_in and not any(path.startswith(_OF_READS) for path in gates):

        def all_of_one(q: Tensor, theta: Theta) -> Tensor:
            return level.memory.read(theta, level.features(q))

        return vmap(vmap(all_of_one))(q, theta)

    def one(q: Tensor, now: State, theta: Theta) -> Tensor:
        own = bind(level, now)
        return own._answer(theta, own.features(q))

    of_heads = vmap(vmap(one))
    return vmap(of_heads, in_dims=(2, 2, None), out_dims=2, chunk_size=AT_ONCE)(q, dict(gates), theta)


_OF_READS = ("features.", "memory.", "output.")


def _after_pending(level: AssociativeMemory, state: State) -> Theta:
    """Return the memory after the last token it has seen, of a chunk that is not over."""

    def one(held: State, before: State, step: Tensor) -> Theta:
        k, v, live = (held[name] for name in ("k", "v", "live"))
        signal = Signal(step=step - live.sum())
        _, new = level.chunk_step(k, k, v, dict(leaves(held["gates"])), live, before, signal)
        return new["memory"]

    return vmap(vmap(one))(state[PENDING], state["level"], state["step"])


def _answered_next(
    level: Level, q: Tensor, now: State, memory: State, pending: State, step: Tensor, count: Tensor
) -> Tensor:
    """Return the answer to one token that is not written, after those that are pending, the first `count`."""
    k, v, live = (pending[name] for name in ("k", "v", "live"))
    place = torch.arange(len(k) + 1, device=k.device) == count

    def then(x: Tensor, last: Tensor) -> Tensor:
        return torch.where(place.reshape(-1, *(1,) * last.ndim), last, torch.cat([x, last[None]]))

    y, _ = level.chunk_step(
        then(torch.zeros_like(k), q),
        then(k, torch.zeros_like(q)),
        then(v, torch.zeros_like(v[0])),
        {path: then(x, now[path].to(x)) for path, x in leaves(pending["gates"])},
        then(live, torch.zeros_like(live[0])),
        memory,
        Signal(step=step - live.sum()),
    )
    return torch.where(place[:, None], y, 0).sum(0)
