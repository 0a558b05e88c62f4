"""A level whose closed form is `deep_memory`: its parts as that kernel's settings, its state as the kernel's."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nestopt.core.associative import AssociativeMemory
from nestopt.core.device import number_like
from nestopt.core.gates import gates_of
from nestopt.core.memories import Mlp, Theta
from nestopt.core.objectives import L2
from nestopt.core.part import Gate, Number
from nestopt.core.retentions import Decay
from nestopt.core.token_batch import per_token, tokens
from nestopt.core.token_reference import PENDING
from nestopt.core.tree import State, leaves, nested, tree_map
from nestopt.levels.deep.mlp import Form
from nestopt.levels.deep.scan import Now, Settings, scan_chunks, written
from nestopt.levels.forms import Rule, rule_of


def deep_form(
    level: AssociativeMemory,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Mapping[str, Tensor],
    state: State,
    mask: Tensor | None,
    checkpoint: int,
) -> tuple[Tensor, State]:
    """`nestopt.core.scan` of `level`, whose `fast_form` is `deep_memory`, with the states of the generic machine."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    given = tokens(q, k, v, mask, *(gate.transpose(1, 2) for gate in gates.values()))
    rule = rule_of(level.rule)
    assert rule is not None
    fresh: State = {
        "k": given.k,
        "v": given.v,
        "live": given.live,
        "gates": nested(
            {
                path: torch.where(given.live, per_token(path, gates.get(path, gate.init), q, dtype), gate.init)
                for path, gate in gates_of(level).items()
            }
        ),
    }
    before: State = state.get(PENDING, {}) if level.span > 1 else {}
    old = before if before and before["k"].shape[2] else None
    features = level.features
    y, now, _ = scan_chunks(
        _now(state, rule, dtype),
        features(given.q),
        None if old is None else _as_kernel(level, rule, old),
        _as_kernel(level, rule, fresh),
        settings_of(level, rule, checkpoint),
    )
    new = _as_state(level, rule, now)
    whole: State = {"step": state["step"] + given.live.sum(-1), "level": new}
    if level.span > 1:
        done = 0 if old is None else old["k"].shape[2]
        whole[PENDING] = _tail(old, fresh, (done + q.shape[1]) % level.chunk)
    return given.answer(y), whole


def deep_after(level: AssociativeMemory, state: State) -> Theta:
    """The parameters of the memory after the last token it has seen, of a chunk that is not over."""
    rule = rule_of(level.rule)
    assert rule is not None
    pending = _as_kernel(level, rule, state[PENDING])
    before = _now(state, rule, pending["k"].dtype)
    weights, _ = written(before, pending, settings_of(level, rule, 0))
    return dict(zip(state["level"]["memory"], weights, strict=True))


def _now(state: State, rule: Rule, dtype: torch.dtype) -> Now:
    """The memory at the start of its chunk, as the kernel takes it."""
    weights = [weight.to(dtype) for weight in state["level"]["memory"].values()]
    if rule.momentum is None:
        return weights, None
    return weights, [_within(part, rule)["momentum"].to(dtype) for part in state["level"]["rule"].values()]


def settings_of(level: AssociativeMemory, rule: Rule, checkpoint: int) -> Settings:
    """What `nestopt.ops.deep_memory` is told of `level`, whose rule is `rule`."""
    memory = level.memory
    form = Form(memory.activation, memory.residual, memory.norm) if isinstance(memory, Mlp) else Form(residual=False)
    return Settings(
        form=form,
        delta=rule.delta,
        objective="l2" if type(level.objective) is L2 else "dot",
        step="normalized" if level.normalized else "raw",
        bound=level.bound,
        read=level.read,
        chunk=level.chunk,
        checkpoint=checkpoint,
    )


def _as_kernel(level: AssociativeMemory, rule: Rule, held: State) -> dict[str, Tensor]:
    """Tokens `[B, H, n, ..]` with the kernel's gates in the place of the level's."""
    live, gates = held["live"], dict(leaves(held["gates"]))

    def gate(number: Number, path: str, idle: float) -> Tensor:
        value = gates[path] if isinstance(number, Gate) else number_like(number, held["k"])
        return torch.where(live, value, idle)

    found = {"k": level.features(held["k"]) * live[..., None], "v": held["v"], "live": live}
    found["lr"] = gate(level.lr, "lr", 0.0) * gate(level.step_size, "step_size", 1.0)
    if isinstance(level.retention, Decay):
        found["decay"] = gate(level.retention.keep, "retention.keep", 1.0)
    if rule.momentum is not None:
        found["momentum"] = gate(rule.momentum, f"rule.{rule.inside}beta", 1.0)
    return found


def _within(part: State, rule: Rule) -> State:
    return part["of"] if rule.wrapped else part


def _as_state(level: AssociativeMemory, rule: Rule, now: Now) -> State:
    names = ["m"] if not isinstance(level.memory, Mlp) else [f"W{i}" for i in range(1, len(now[0]) + 1)]
    rules: State = {}
    for i, name in enumerate(names):
        inner: State = {} if now[1] is None else {"momentum": now[1][i]}
        rules[name] = {"of": inner} if rule.wrapped else inner
    return {"memory": dict(zip(names, now[0], strict=True)), "rule": rules}


def _tail(old: State | None, fresh: State, size: int) -> State:
    """The last `size` tokens of all."""
    length = fresh["k"].shape[2]
    if old is None or size <= length:
        return tree_map(lambda x: x[:, :, length - size :], fresh)
    return tree_map(lambda old, new: torch.cat([old.to(new.dtype), new], dim=2)[:, :, -size:], old, fresh)
