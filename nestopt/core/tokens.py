"""The generic machine on tokens: any level, a plain loop over time, one memory per sequence and head.

Slow and right: it is what every fast form is tested against, and what runs where there is none.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.func import vmap

from nestopt.core.gates import bind
from nestopt.core.level import Level
from nestopt.core.signal import Signal
from nestopt.core.tree import State, tree_map


def begin(level: Level, q: Tensor, v: Tensor, learned: Mapping[str, Tensor] | None = None) -> State:
    """The state before the first token of sequences like `q`, `v` `[B, T, H, D]`.

    `learned` is the start that a layer learned, `[H, ...]` each. Leaves of the state are `[B, H, ...]`; `"step"`
    counts the tokens seen, `[B, H]`.
    """
    batch, _, heads, dim_k = q.shape
    level = bind(level)

    def one(learned: State) -> State:
        return level.begin(dim_k, v.shape[-1], v, learned)

    if learned:
        state = vmap(one)(dict(learned))
    else:
        first = one({})
        state = tree_map(lambda leaf: leaf.expand(heads, *leaf.shape), first)
    state = tree_map(lambda leaf: leaf.expand(batch, *leaf.shape), state)
    return {"step": torch.zeros(batch, heads, dtype=torch.int64, device=v.device), "level": state}


def scan(
    level: Level,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    gates: Mapping[str, Tensor] | None = None,
    state: State | None = None,
    learned: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, State]:
    """Run `level` over tokens, one by one.

    Args:
        level: any level; its gates that are not in `gates` take their initial value.
        q, k: `[B, T, H, D_k]`.
        v: `[B, T, H, D_v]`.
        gates: values of the level's gates by dotted path, `[B, T, H]` each.
        state: from a former call, to go on from there; None starts anew (from `learned`).
        learned: the start a layer learned, `[H, ...]` by name (`Level.learned_start`).

    Returns:
        y `[B, T, H, D_v]` and the state. Differentiable throughout; every sequence and head has its own memory.
    """
    if q.shape[1] == 0:
        raise ValueError(f"q has the shape {list(q.shape)}: there is no token in it; give one or more")
    gates = dict(gates or {})
    state = begin(level, q, v, learned) if state is None else state

    def token(q: Tensor, k: Tensor, v: Tensor, now: State, before: State, step: Tensor) -> tuple[Tensor, State]:
        return bind(level, now).attend(q, k, v, before, Signal(step=step))

    batched = vmap(vmap(token))
    step, memory, ys = state["step"], state["level"], []
    for t in range(q.shape[1]):
        step = step + 1
        now = {path: gate[:, t] for path, gate in gates.items()}
        y, memory = batched(q[:, t], k[:, t], v[:, t], now, memory, step)
        ys.append(y)
    return torch.stack(ys, dim=1), {"step": step, "level": memory}
