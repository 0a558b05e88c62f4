"""Matrix memories on tokens: which closed form computes a level, by chunks and by single tokens.

All keep the reference machine's state: M in `"memory"`, and in `"rule"` the momentum S, a sum of gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from nestopt.core.associative import AssociativeMemory
from nestopt.core.level import Level
from nestopt.core.memories import Matrix
from nestopt.core.objectives import L2, Dot, Oja
from nestopt.core.part import Number
from nestopt.core.precision import matmul
from nestopt.core.retentions import Decay
from nestopt.core.token_batch import TokenBatch
from nestopt.core.token_form import Accepted, FormSetting, Refused, TokenForm
from nestopt.core.tree import State
from nestopt.levels.closed_form import (
    LinearRule,
    featured,
    is_number,
    is_one,
    is_plain,
    is_sum,
    linear_rule,
    overridden,
    refusal,
    refusal_of_writes,
)
from nestopt.levels.deep.step_size import EPS
from nestopt.levels.gradient.momentum import Momentum
from nestopt.levels.matrix.delta_rule import delta_scan
from nestopt.levels.matrix.level import Omega
from nestopt.levels.matrix.linear_attention import linear_scan
from nestopt.levels.matrix.oja import oja_scan
from nestopt.levels.matrix.omega import omega_scan, weights_of
from nestopt.levels.matrix.segments import chunk_for, is_by_channel, over_segments

CHUNK = 64
"""Pairs that `oja` and `omega` compute at once, as `nestopt.ops` does by default."""


class MatrixForm(TokenForm):
    """What the closed forms of matrix memories share."""

    levels: ClassVar[tuple[type[Level], ...]] = (AssociativeMemory,)
    own: ClassVar[type[AssociativeMemory]] = AssociativeMemory
    """The class whose methods it computes."""
    level: AssociativeMemory

    def __init__(self, level: Level, setting: FormSetting) -> None:
        super().__init__(level, setting)
        assert isinstance(level, AssociativeMemory)
        self.rule = linear_rule(level.rule) or LinearRule()
        self.reads = "after" if level.read == "after" else "before"  # a chunk of one token begins before its write

    def shown(self, tokens: TokenBatch) -> TokenBatch:
        """Return the tokens with the level's features of queries and keys."""
        return featured(self.level.features, tokens)

    def strength(self, gates: Mapping[str, Tensor], like: Tensor) -> Tensor:
        """η: how strongly a pair is written, `[B, H, T]` or 1."""
        lr = self.number(self.level.lr, "lr", gates, like)
        if is_one(self.level.step_size):
            return lr
        return lr * self.number(self.level.step_size, "step_size", gates, like)

    def decays(self, gates: Mapping[str, Tensor], like: Tensor) -> dict[str, Tensor]:
        """α as the gate `decay`, if the memory fades."""
        if not isinstance(self.level.retention, Decay):
            return {}
        return {"decay": self.number(self.level.retention.keep, "retention.keep", gates, like)}


def _other_kind(level: AssociativeMemory, objective: type) -> Refused | None:
    """Refuse what is no matrix memory with this objective."""
    if type(level.memory) is not Matrix:
        return Refused(f"memory={level.memory.label}: it is for matrix memories", other_kind=True)
    if type(level.objective) is not objective:
        return Refused(f"objective={level.objective.label}", other_kind=True)
    return None


def _in_chunks(level: AssociativeMemory) -> str:
    """Say why the recurrence of `level` does not go from token to token."""
    if level.chunk > 1:
        return f"chunk={level.chunk}: its gradients are of the memory that a chunk began with"
    rule = linear_rule(level.rule)
    if rule is not None and rule.wrapped:
        return f"rule={level.rule.label}: it has a delta decay"
    return ""


def kept(memory: Tensor, x: TokenBatch, gates: Mapping[str, Tensor]) -> Tensor:
    """Return what one token leaves of the memory before it, `[B, H, D_v, D_k]`."""
    if "decay" not in gates:
        return memory
    decay = x.gate(gates["decay"], 1.0)
    return memory * (decay if is_by_channel(gates) else decay[..., None])


class LinearAttentionForm(MatrixForm):
    """Sum values times keys, with a decay: linear attention, and momentum on tokens."""

    levels: ClassVar[tuple[type[Level], ...]] = (AssociativeMemory, Momentum)

    def __init__(self, level: Level, setting: FormSetting) -> None:
        if isinstance(level, AssociativeMemory):
            super().__init__(level, setting)
        else:
            TokenForm.__init__(self, level, setting)
            self.reads = "after"

    @classmethod
    def accepts(cls, level: Level, device: torch.device, dtype: torch.dtype) -> Accepted | Refused:
        words = "linear attention, exact and parallel within chunks"
        if isinstance(level, Momentum):
            if why := overridden(level, Momentum):
                return Refused(why)
            if level.of_tokens or not is_sum(level) or not is_number(level.dampening):
                return Refused("its direction is not a sum of gradients with one decay")
            return Accepted(words)
        assert isinstance(level, AssociativeMemory)
        if other := _other_kind(level, Dot):
            return other
        why = refusal(level, cls.own) or refusal_of_writes(level, channels=True) or _in_chunks(level)
        if not why and not is_plain(level.rule):
            why = f"rule={level.rule.label}: values are summed without momentum"
        if not why and level.normalized:
            why = f"normalized={level.normalized}"
        return Refused(why) if why else Accepted(words)

    def forward(self, tokens: TokenBatch, gates: Mapping[str, Tensor], state: State) -> tuple[Tensor, State]:
        x, fading, before = self._as_sum(tokens, gates, state["level"])
        y, memory = over_segments(partial(linear_scan, read=self.reads), x, fading, before, chunk_for(x.k))
        return y, self._after(state, tokens, memory)

    def step(self, tokens: TokenBatch, gates: Mapping[str, Tensor], state: State) -> tuple[Tensor, State]:
        x, fading, before = self._as_sum(tokens, gates, state["level"])
        faded = kept(before, x, fading)
        after = torch.addcmul(faded, x.v.mT, x.k)
        y = matmul(x.q, (after if self.reads == "after" else before).mT)
        return y, self._after(state, tokens, after)

    def _as_sum(
        self, tokens: TokenBatch, gates: Mapping[str, Tensor], level: State
    ) -> tuple[TokenBatch, dict[str, Tensor], Tensor]:
        """Return the tokens as they are written, their decay, and the memory before them."""
        if isinstance(self.level, Momentum):
            own = self.level
            fading = {"decay": self.number(own.beta, "beta", gates, tokens.k)}
            weight = _less_than_one(own.dampening, self.number(own.dampening, "dampening", gates, tokens.k))
            return _weighed(tokens, weight), fading, level["momentum"]
        plain = is_one(self.level.lr) and is_one(self.level.step_size)
        weight = None if plain else self.strength(gates, tokens.k)
        return _weighed(self.shown(tokens), weight), self.decays(gates, tokens.k), level["memory"]["m"]

    def _after(self, state: State, tokens: TokenBatch, memory: Tensor) -> State:
        is_sum = isinstance(self.level, Momentum)
        level = {"momentum": memory} if is_sum else {**state["level"], "memory": {"m": memory}}
        return {"step": state["step"] + tokens.length, "level": level}


def _less_than_one(number: Number, value: Tensor) -> Tensor | None:
    """1 - value, of a number of a level; None where that is 1."""
    return None if isinstance(number, int | float) and number == 0 else 1 - value


def _weighed(tokens: TokenBatch, weight: Tensor | None) -> TokenBatch:
    """Return the tokens with their values times a number each, `[B, H, T]` or 1."""
    return tokens if weight is None else tokens.replace(v=tokens.v * weight[..., None])


class DeltaRuleForm(MatrixForm):
    """Correct what the memory answers: the delta rule, gated, normalised, with momentum."""

    @classmethod
    def accepts(cls, level: Level, device: torch.device, dtype: torch.dtype) -> Accepted | Refused:
        assert isinstance(level, AssociativeMemory)
        if other := _other_kind(level, L2):
            return other
        why = refusal(level, cls.own) or refusal_of_writes(level, channels=True) or _in_chunks(level)
        if not why and level.normalized == "layerwise":
            why = "normalized='layerwise'"
        if not why and level.fade == "before" and level.normalized:
            why = "normalized=True with fade='before'"
        return Refused(why) if why else Accepted("the delta rule, exact and parallel within chunks")

    def forward(self, tokens: TokenBatch, gates: Mapping[str, Tensor], state: State) -> tuple[Tensor, State]:
        x, before = self.shown(tokens), state["level"]["memory"]["m"]
        made = {"lr": self.strength(gates, x.k), **self.decays(gates, x.k)}
        if self.rule.momentum is not None:
            made["momentum"] = self.number(self.rule.momentum, "rule.beta", gates, x.k)
            before = torch.cat([before, self.rule.momentum_in(state["level"]["rule"]["m"])], dim=-1)
        if self.level.normalized:
            made["lr"] = self._normalized(made, x.k)
        run = partial(delta_scan, read=self.reads, decay_first=self.level.fade == "before")
        y, after = over_segments(run, x, made, before, chunk_for(x.k))
        if self.rule.momentum is None:
            return y, self._after(state, tokens, after, state["level"]["rule"])
        memory, momentum = after.chunk(2, dim=-1)
        return y, self._after(state, tokens, memory, {"m": self.rule.state(momentum)})

    def step(self, tokens: TokenBatch, gates: Mapping[str, Tensor], state: State) -> tuple[Tensor, State]:
        if self.rule.momentum is not None:
            return self.forward(tokens, gates, state)
        x, before = self.shown(tokens), state["level"]["memory"]["m"]
        made = {"lr": self.strength(gates, x.k), **self.decays(gates, x.k)}
        lr = self._normalized(made, x.k) if self.level.normalized else made["lr"]
        faded = kept(before, x, made)
        error = x.v - matmul(x.k, (faded if self.level.fade == "before" else before).mT)
        after = torch.addcmul(faded, (x.gate(lr, 0.0)[..., None] * error).mT, x.k)
        y = matmul(x.q, (after if self.reads == "after" else before).mT)
        return y, self._after(state, tokens, after, state["level"]["rule"])

    def _normalized(self, made: Mapping[str, Tensor], k: Tensor) -> Tensor:
        """η of the normalised step, which does not pass `bound`."""
        lr = self.level.bound * made["lr"]
        lr = lr * made["decay"] if "decay" in made else lr
        lr = lr * (1 - made["momentum"]) if "momentum" in made else lr
        return lr / (EPS + k.square().sum(-1))

    def _after(self, state: State, tokens: TokenBatch, memory: Tensor, rule: State) -> State:
        level = {**state["level"], "memory": {"m": memory}, "rule": rule}
        return {"step": state["step"] + tokens.length, "level": level}


class OjaForm(MatrixForm):
    """Oja's rule: the delta rule on the transposed memory."""

    @classmethod
    def accepts(cls, level: Level, device: torch.device, dtype: torch.dtype) -> Accepted | Refused:
        assert isinstance(level, AssociativeMemory)
        if other := _other_kind(level, Oja):
            return other
        why = refusal(level) or refusal_of_writes(level) or _in_chunks(level)
        odd = {"rule": level.rule.label} if not is_plain(level.rule) else {}
        odd |= {"normalized": f"{level.normalized}"} if level.normalized else {}
        odd |= {"fade": "before"} if level.fade == "before" else {}
        odd |= {} if level.read == "after" else {"read": level.read}
        why = why or ", ".join(f"{key}={value}" for key, value in odd.items())
        return Refused(why) if why else Accepted("Oja's rule, exact and parallel within chunks")

    def forward(self, tokens: TokenBatch, gates: Mapping[str, Tensor], state: State) -> tuple[Tensor, State]:
        x = self.shown(tokens)
        made = {"lr": self.strength(gates, x.k), **self.decays(gates, x.k)}
        y, memory = over_segments(partial(oja_scan, read="after"), x, made, state["level"]["memory"]["m"], CHUNK)
        level = {**state["level"], "memory": {"m": memory}}
        return y, {"step": state["step"] + tokens.length, "level": level}


class OmegaForm(MatrixForm):
    """The omega rule on a matrix: one step a token on the last pairs together."""

    levels: ClassVar[tuple[type[Level], ...]] = (Omega,)
    level: Omega

    @classmethod
    def accepts(cls, level: Level, device: torch.device, dtype: torch.dtype) -> Accepted | Refused:
        assert isinstance(level, Omega)
        if other := _other_kind(level, L2):
            return other
        why = refusal(level, Omega) or refusal_of_writes(level) or _in_chunks(level)
        if not why and not is_plain(level.rule):
            why = f"rule={level.rule.label}"
        if not why and level.read != "after":
            why = f"read={level.read!r}"
        return Refused(why) if why else Accepted("the omega rule, exact and parallel within chunks")

    def forward(self, tokens: TokenBatch, gates: Mapping[str, Tensor], state: State) -> tuple[Tensor, State]:
        x, before, window = self.shown(tokens), state["level"], self.level.window
        made = {"lr": self.strength(gates, x.k), **self.decays(gates, x.k)}
        # places that no token has taken yet hold keys of zeros, which write nothing
        start = {"memory": before["memory"]["m"], **{name: before["window"][name] for name in ("keys", "values")}}
        run = partial(omega_scan, read="after", weight=weights_of(self.level.weight, window, x.k))
        y, after = over_segments(run, x, made, start, max(1, CHUNK // window), rows=window)
        count = tokens.count
        counted = before["window"]["counts"].sum(-1) + count
        places = torch.arange(window - 1, 0, -1, device=x.k.device)
        pairs: dict[str, Any] = {name: after[name] for name in ("keys", "values")}
        pairs["counts"] = (counted[..., None] >= places).to(before["window"]["counts"])
        level = {**before, "memory": {"m": after["memory"]}, "window": pairs}
        return y, {"step": state["step"] + count, "level": level}
