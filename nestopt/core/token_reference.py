"""The generic machine on tokens: any level, a plain loop over time, one memory per sequence and head.

Slow and right: it is what every fast form is tested against, and what runs where there is none.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.func import vmap

from nestopt.core.gates import bind, gates_of, per_head
from nestopt.core.level import Level
from nestopt.core.recall import recalled
from nestopt.core.signal import Signal
from nestopt.core.tree import State, leaves, nested, tree_map


def begin(level: Level, q: Tensor, v: Tensor, learned: Mapping[str, Tensor] | None = None) -> State:
    """The state before the first token of sequences like `q`, `v` `[B, T, H, D]`.

    `learned` is the start that a layer learned, `[H, ...]` each. Leaves of the state are `[B, H, ...]`; `"step"`
    counts the tokens seen, `[B, H]`. Of a level with a `span` above 1, `"level"` is the state at the start of a chunk
    that is not over, and `"pending"` has its tokens so far: k, v, which of them are live, and the gates by path,
    `[B, H, n, ..]`; a level that `keeps_pending` has them in a way of its own.
    """
    batch, _, heads, dim_k = q.shape
    gates = gates_of(level)
    level = bind(level)

    def one(learned: State) -> State:
        return level.begin(dim_k, v.shape[-1], v, learned)

    if learned:
        state = vmap(one, randomness="different")(dict(learned))  # a rule may start at random
    else:
        first = one({})
        state = tree_map(lambda leaf: leaf.expand(heads, *leaf.shape), first)
    state = tree_map(lambda leaf: leaf.expand(batch, *leaf.shape), state)
    whole: State = {"step": torch.zeros(batch, heads, dtype=torch.int64, device=v.device), "level": state}
    if level.span > 1 and not level.keeps_pending:
        none = (batch, heads, 0)
        whole[PENDING] = {
            "k": v.new_zeros(*none, dim_k),
            "v": v.new_zeros(*none, v.shape[-1]),
            "live": torch.zeros(none, dtype=torch.bool, device=v.device),
            "gates": nested({path: v.new_zeros(none) for path in gates}),
        }
    return whole


def scan(
    level: Level,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    gates: Mapping[str, Tensor] | None = None,
    state: State | None = None,
    learned: Mapping[str, Tensor] | None = None,
    live: Tensor | None = None,
    learn: bool = True,
) -> tuple[Tensor, State]:
    """Run `level` over tokens, one by one; or, where it has a `span` of more, a chunk of tokens after the other.

    Args:
        level: any level; its gates that are not in `gates` take their initial value.
        q, k: `[B, T, H, D_k]`.
        v: `[B, T, H, D_v]`.
        gates: values of the level's gates by dotted path, `[B, T, H]` each.
        state: from a former call, to go on from there; None starts anew (from `learned`).
        learned: the start a layer learned, `[H, ...]` by name (`Level.learned_start`).
        live: `[B, T, H]`, which tokens are written; None is all. The others take their place in a chunk, and leave
            everything else as it was, but that a memory that grows takes them in with the rest.
        learn: False reads only (`nestopt.core.recall`), and gives `state` back; k and v are then not looked at.

    Returns:
        y `[B, T, H, D_v]` and the state. Differentiable throughout; every sequence and head has its own memory.
    """
    if q.shape[1] == 0:
        raise ValueError(f"q has the shape {list(q.shape)}: there is no token in it; give one or more")
    state = begin(level, q, v, learned) if state is None else state
    gates = {**per_head(level, v), **(gates or {})}
    if not learn:
        return recalled(level, q, v.shape[-1], state, every_gate(level, gates, v)), state
    if level.keeps_pending:
        return _scan_whole(level, q, k, v, every_gate(level, gates, v), state, live)
    if level.span > 1:
        return _scan_chunks(level, q, k, v, every_gate(level, gates, v), state, live)

    def token(q: Tensor, k: Tensor, v: Tensor, now: State, before: State, step: Tensor) -> tuple[Tensor, State]:
        return bind(level, now).attend(q, k, v, before, Signal(step=step))

    batched = vmap(vmap(token))
    step, memory, ys = state["step"], state["level"], []
    for t in range(q.shape[1]):
        step = step + 1 if live is None else step + live[:, t]
        now = {path: gate[:, t] for path, gate in gates.items()}
        y, new = batched(q[:, t], k[:, t], v[:, t], now, memory, step if live is None else step.clamp_min(1))
        memory = new if live is None else _where(live[:, t], new, memory)
        ys.append(y)
    return torch.stack(ys, dim=1), {"step": step, "level": memory}


def every_gate(level: Level, gates: Mapping[str, Tensor], v: Tensor) -> dict[str, Tensor]:
    """A value `[B, T, H]` for each gate of `level`: its initial one where none is given."""
    return {path: gates.get(path, v.new_full(v.shape[:3], gate.init)) for path, gate in gates_of(level).items()}


def _scan_chunks(
    level: Level,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Mapping[str, Tensor],
    state: State,
    live: Tensor | None,
) -> tuple[Tensor, State]:
    pending = state[PENDING]
    done, length = pending["k"].shape[2], q.shape[1]
    live = torch.ones(v.shape[:3], dtype=torch.bool, device=v.device) if live is None else live
    fresh = {"k": k, "v": v, "live": live, "gates": nested(gates)}
    held = tree_map(lambda old, new: torch.cat([old, new.transpose(1, 2)], dim=2), pending, fresh)
    # tokens that were answered before ask nothing
    queries = torch.nn.functional.pad(q.transpose(1, 2), (0, 0, done, 0))

    def chunk(q: Tensor, held: State, before: State, step: Tensor) -> tuple[Tensor, State]:
        gates = dict(leaves(held["gates"]))
        return level.attend_chunk(q, held["k"], held["v"], gates, held["live"], before, Signal(step=step))

    batched = vmap(vmap(chunk))
    memory, ys, rest = state["level"], [], tree_map(lambda x: x[:, :, :0], held)
    step = state["step"] - pending["live"].sum(-1)
    for first in range(0, done + length, level.span):
        part = tree_map(lambda x: x[:, :, first : first + level.span], held)  # noqa: B023
        y, new = batched(queries[:, :, first : first + level.span], part, memory, step)
        ys.append(y)
        if part["k"].shape[2] == level.span:
            memory, step = new, step + part["live"].sum(-1)
        else:
            rest = part
    whole = {"step": step + rest["live"].sum(-1), "level": memory, PENDING: rest}
    return torch.cat(ys, dim=2)[:, :, done:].transpose(1, 2), whole


def _scan_whole(
    level: Level,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Mapping[str, Tensor],
    state: State,
    live: Tensor | None,
) -> tuple[Tensor, State]:
    """All tokens at once, of a level that keeps those of its chunks itself."""
    live = torch.ones(v.shape[:3], dtype=torch.bool, device=v.device) if live is None else live

    def chunk(
        q: Tensor, k: Tensor, v: Tensor, gates: State, live: Tensor, before: State, step: Tensor
    ) -> tuple[Tensor, State]:
        return level.attend_chunk(q, k, v, gates, live, before, Signal(step=step))

    of_sequences = vmap(vmap(chunk))
    each = tree_map(lambda x: x.transpose(1, 2), {"q": q, "k": k, "v": v, "gates": dict(gates), "live": live})
    y, new = of_sequences(each["q"], each["k"], each["v"], each["gates"], each["live"], state["level"], state["step"])
    return y.transpose(1, 2), {"step": state["step"] + live.sum(1), "level": new}


def _where(live: Tensor, new: State, old: State) -> State:
    """`new` where `live` `[B, H]`, else `old`; a memory that has grown is taken as it is, whatever it took in."""

    def choose(new: Tensor, old: Tensor) -> Tensor:
        if new.shape != old.shape:
            return new
        return torch.where(live.reshape(*live.shape, *(1,) * (new.ndim - 2)), new, old)

    return tree_map(choose, new, old)


PENDING = "pending"
"""Key of a state: the tokens of a chunk that is not over."""
