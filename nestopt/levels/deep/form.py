"""Memories made of weights, on tokens: the closed form of their chunks, and a token alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from nestopt.core.associative import AssociativeMemory
from nestopt.core.device import number_like
from nestopt.core.level import Level
from nestopt.core.memories import Matrix, Mlp
from nestopt.core.objectives import Objective
from nestopt.core.part import Gate, Number
from nestopt.core.pending import PENDING
from nestopt.core.recall import answers
from nestopt.core.retentions import Decay
from nestopt.core.token_batch import TokenBatch
from nestopt.core.token_form import Accepted, FormSetting, Refused, TokenForm
from nestopt.core.tree import State, leaves, nested, tree_map
from nestopt.levels.closed_form import LinearRule, linear_rule, refusal, refusal_of_writes
from nestopt.levels.deep.mlp import Form, Settings, step_of
from nestopt.levels.deep.scan import WeightState, scan_chunks, write_open


class DeepMemoryForm(TokenForm):
    """Write memories of weights a chunk at a time, by products of matrices: TTT, Titans, DLA."""

    levels: ClassVar[tuple[type[Level], ...]] = (AssociativeMemory,)
    priority: ClassVar[int] = -1  # what is exact from token to token goes before
    level: AssociativeMemory

    def __init__(self, level: Level, setting: FormSetting) -> None:
        super().__init__(level, setting)
        rule = linear_rule(self.level.rule)
        assert rule is not None
        self.rule = rule
        self.settings = settings_of(self.level, rule, setting.checkpoint)

    @classmethod
    def accepts(cls, level: Level, device: torch.device, dtype: torch.dtype) -> Accepted | Refused:
        assert isinstance(level, AssociativeMemory)
        if type(level.memory) not in (Matrix, Mlp):
            return Refused(f"memory={level.memory.label}: it is for memories of weights", other_kind=True)
        why = refusal(level) or refusal_of_writes(level)
        if not why and isinstance(level.memory, Mlp) and not level.memory.by_hand:
            why = "its memory has biases"
        if not why and level.fade == "before":
            why = "fade='before'"
        if not why and not _writes_its_gradient(type(level.objective)):
            why = f"objective={level.objective.label}: its gradient is not written down (`Objective.error`)"
        return Refused(why) if why else Accepted("products of matrices, a chunk at a time")

    def forward(self, tokens: TokenBatch, gates: Mapping[str, Tensor], state: State) -> tuple[Tensor, State]:
        fresh = _kept(tokens, self.every_gate(tokens, gates))
        old = state[PENDING] if self.pending(state) else None
        y, now, _ = scan_chunks(
            self._now(state),
            self.level.features(tokens.q),
            None if old is None else self._as_kernel(old),
            self._as_kernel(fresh),
            self.settings,
        )
        whole: State = {"step": state["step"] + tokens.count, "level": self._as_state(now)}
        if self.chunk > 1:
            whole[PENDING] = _tail(old, fresh, (self.pending(state) + tokens.k.shape[2]) % self.chunk)
        return y, whole

    def step(self, tokens: TokenBatch, gates: Mapping[str, Tensor], state: State) -> tuple[Tensor, State]:
        if self.level.read != "chunk" or self.chunk == 1 or self.pending(state) == self.chunk - 1:
            return self.forward(tokens, gates, state)
        # a token within a chunk is answered from the memory that the chunk began with, and kept
        y = self.level.memory.read(state["level"]["memory"], self.level.features(tokens.q))
        held = tree_map(lambda old, new: torch.cat([old, new], dim=2), state[PENDING], _kept(tokens, gates))
        return y, {**state, "step": state["step"] + tokens.count, PENDING: held}

    def read(self, tokens: TokenBatch, gates: Mapping[str, Tensor], state: State) -> Tensor:
        theta = state["level"]["memory"]
        if self.pending(state) and self.level.read != "chunk":
            weights, _ = write_open(self._now(state), self._as_kernel(state[PENDING]), self.settings)
            theta = dict(zip(theta, weights, strict=True))
        return answers(self.level, tokens.q, theta, gates)

    def _now(self, state: State) -> WeightState:
        """Return the memory at the start of its chunk, as the kernel takes it."""
        weights = list(state["level"]["memory"].values())
        if self.rule.momentum is None:
            return weights, None
        return weights, [self.rule.momentum_in(part) for part in state["level"]["rule"].values()]

    def _as_kernel(self, held: State) -> dict[str, Tensor]:
        """Return tokens `[B, H, n, ..]` with the kernel's gates in the place of the level's."""
        live, gates, level = held["live"], dict(leaves(held["gates"])), self.level

        def gate(number: Number, path: str, idle: float) -> Tensor:
            value = gates[path] if isinstance(number, Gate) else number_like(number, held["k"])
            return torch.where(live, value, idle)

        found = {"k": level.features(held["k"]) * live[..., None], "v": held["v"], "live": live}
        found["lr"] = gate(level.lr, "lr", 0.0) * gate(level.step_size, "step_size", 1.0)
        if isinstance(level.retention, Decay):
            found["decay"] = gate(level.retention.keep, "retention.keep", 1.0)
        if self.rule.momentum is not None:
            found["momentum"] = gate(self.rule.momentum, f"rule.{self.rule.inside}beta", 1.0)
        return found

    def _as_state(self, now: WeightState) -> State:
        weights, momenta = now
        names = [f"W{i}" for i in range(1, len(weights) + 1)] if isinstance(self.level.memory, Mlp) else ["m"]
        kept: Sequence[Tensor | None] = momenta or [None] * len(weights)
        rules = [self.rule.state(momentum) for momentum in kept]
        return {"memory": dict(zip(names, weights, strict=True)), "rule": dict(zip(names, rules, strict=True))}


def _writes_its_gradient(objective: type[Objective]) -> bool:
    """Return whether an objective is one of the read alone, and its `error` is that of its own `__call__`."""

    def defines(name: str) -> type:
        return next(cls for cls in objective.__mro__ if name in vars(cls))

    own = objective.loss is Objective.loss and objective.error is not Objective.error
    return own and issubclass(defines("error"), defines("__call__"))


def settings_of(level: AssociativeMemory, rule: LinearRule, checkpoint: int) -> Settings:
    """Return what `nestopt.ops.deep_memory` is told of `level`, whose rule is `rule`."""
    memory = level.memory
    form = Form(memory.activation, memory.residual, memory.norm) if isinstance(memory, Mlp) else Form(residual=False)
    return Settings(
        form=form,
        delta=rule.delta,
        objective=level.objective,
        step=step_of(level.normalized),
        bound=level.bound,
        forget=level.forget,
        read=level.read,
        chunk=level.chunk,
        checkpoint=checkpoint,
    )


def _kept(tokens: TokenBatch, gates: Mapping[str, Tensor]) -> State:
    """Return tokens as they are kept until their chunk is over."""
    return {"k": tokens.k, "v": tokens.v, "live": tokens.active, "gates": nested(gates)}


def _tail(old: State | None, fresh: State, size: int) -> State:
    """Return the last `size` tokens of all."""
    length = fresh["k"].shape[2]
    if old is None or size <= length:
        return tree_map(lambda x: x[:, :, length - size :], fresh)
    return tree_map(lambda old, new: torch.cat([old.to(new.dtype), new], dim=2)[:, :, -size:], old, fresh)
