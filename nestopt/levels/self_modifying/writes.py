"""How one memory of `self_modifying` is written: as an associative memory whose values are its own."""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

from nestopt.core.associative import AssociativeMemory
from nestopt.core.memories import Mlp, Theta
from nestopt.core.normalized import joint_rates
from nestopt.core.objectives import L2, Dot
from nestopt.core.part import Gate, Number
from nestopt.core.retentions import Decay
from nestopt.core.signal import Signal
from nestopt.core.tree import State
from nestopt.levels.gradient.dgd import Dgd
from nestopt.levels.gradient.momentum import Momentum

OBJECTIVES = {"l2": L2(), "dot": Dot()}


class SelfWriting(Protocol):
    """What a level says of the memories that it writes: `SelfModifying`."""

    memory: Mlp
    momentum: Number | None
    delta: float
    normalized: bool | Literal["layerwise"]
    bound: float
    objective: Literal["l2", "dot"]

    def own_values(self, theta: Theta, v: Tensor) -> Tensor:
        """Return the values v̂ that a memory makes of v."""
        ...


def in_turn(level: SelfWriting, box: State, tokens: State, signal: Signal) -> State:
    """Return a memory, its `"weights"` and perhaps `"momentum"`, after a chunk of tokens, one after the other.

    Args:
        level: whose memory.
        box: as the chunk found it.
        tokens: `"k"`, `"v"` `[C, D]`, and `[C]`: `"live"`, `"lr"`, `"decay"`, perhaps `"momentum"`.
        signal: of the step.
    """
    gates = {"lr": tokens["lr"], "retention.keep": tokens["decay"]}
    theta = None
    if level.momentum is not None:
        theta, gates["rule.of.beta"] = Gate(0.5), tokens["momentum"]
    k, own = tokens["k"], level.own_values(box["weights"], tokens["v"])
    writer = _writer(level, len(k), Gate(0.5), theta)
    _, after = writer.chunk_step(k, k, own, gates, tokens["live"], _as_writers(box), signal)
    return _as_box(after, box)


def together(level: SelfWriting, box: State, tokens: State, signal: Signal) -> State:
    """Return a memory after pairs that come at once: one step on the sum of their gradients, and one retention."""
    keep, rate, k, weights = tokens["decay"], tokens["lr"], tokens["k"], box["weights"]
    writer = _writer(level, 1, keep.mean(), level.momentum)
    if level.normalized:
        damping = keep if level.momentum is None else keep * (1 - level.momentum)  # type: ignore[operator]
        rate = joint_rates(writer, weights, k, rate, damping, torch.full_like(rate, level.delta))
    surprise = writer.gradient(weights, k, level.own_values(weights, tokens["v"]), rate)
    rules = _as_writers(box)["rule"]
    new, rules = writer.learn(weights, rules, surprise, signal, writer.shown(weights, k, rate))
    return _as_box({"memory": new, "rule": rules}, box)


def _writer(level: SelfWriting, chunk: int, keep: Number, theta: Number | None) -> AssociativeMemory:
    return AssociativeMemory(
        memory=level.memory,
        objective=OBJECTIVES[level.objective],
        rule=Dgd(delta=level.delta) if theta is None else Dgd(of=Momentum(theta), delta=level.delta),
        retention=Decay(keep),
        lr=Gate(0.5),
        chunk=chunk,
        read="chunk",
        normalized=level.normalized,
        bound=level.bound,
    )


def _as_writers(box: State) -> State:
    """Return a memory's state as `_writer` keeps it."""
    momenta = box.get("momentum")
    return {
        "memory": box["weights"],
        "rule": {name: {"of": {} if momenta is None else {"momentum": momenta[name]}} for name in box["weights"]},
    }


def _as_box(state: State, before: State) -> State:
    box: State = {"weights": state["memory"]}
    if "momentum" in before:
        box["momentum"] = {name: rule["of"]["momentum"] for name, rule in state["rule"].items()}
    return box
