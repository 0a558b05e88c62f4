"""Matrix memories that are asked at another key than they write along, beyond what parts say: RWKV-7 and Comba."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from nestopt.core.associative import AssociativeMemory, Gd
from nestopt.core.features import Identity
from nestopt.core.level import Level
from nestopt.core.memories import Matrix, Memory
from nestopt.core.objectives import L2, Objective
from nestopt.core.part import Channels, FieldError, Gate, Number
from nestopt.core.precision import matmul
from nestopt.core.retentions import Decay, Keep, Retention
from nestopt.core.signal import Signal
from nestopt.core.token_batch import TokenBatch
from nestopt.core.token_form import Accepted, Refused
from nestopt.core.tree import State
from nestopt.kernels.unit import unit
from nestopt.levels.closed_form import is_number, overridden
from nestopt.levels.matrix.form import DeltaRuleForm, MatrixForm, kept
from nestopt.levels.matrix.rank_one import rank_one_scan
from nestopt.levels.matrix.segments import chunk_for, over_segments
from nestopt.levels.presets import GatedDeltanet

LEAST_KEPT = math.exp(-math.exp(-0.5))
"""The least decay of RWKV-7: its logarithm is above -0.607."""


class Rwkv7(AssociativeMemory):
    r"""RWKV-7 (Peng et al. 2025): a matrix memory that takes off at one key and writes at another.

    $$M_t = M_{t-1}\big(\mathrm{Diag}(\alpha_t) - \hat\kappa_t (a_t\odot\hat\kappa_t)^\top\big) + v_t \tilde k_t^\top,
      \qquad y_t = M_t q_t$$

    $$\kappa_t = \xi\odot k_t, \qquad \hat\kappa_t = \kappa_t/\lVert\kappa_t\rVert, \qquad
      \tilde k_t = k_t\odot(1 + (a_t - 1)\odot\rho)$$

    α and a `[D_k]` are gates of the token; ξ (`removal`) and ρ (`replacement`) `[D_k]` are learned by layers, one for
    each head, and start at 1. On gradients it is the memory with `lr=1`.

    Args:
        rate: a, in [0, 1], how much is taken off in each channel. Default a gate for each that starts at ½.

    Other arguments: `associative_memory`; the retention's `keep` is α, which starts at 0.97 and stays above 0.545. All
    but `retention` and `rate` stay at their defaults.
    """

    constant_keys: ClassVar[tuple[str, ...]] = ("removal", "replacement")
    by_channel: ClassVar[tuple[str, ...]] = ("rate",)

    memory: Memory = dataclasses.field(default_factory=Matrix)
    objective: Objective = dataclasses.field(default_factory=L2)
    retention: Retention = dataclasses.field(default_factory=lambda: Decay(Channels(0.97, LEAST_KEPT)))
    rate: Number = Channels(0.5)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("rate", 0.0, 1.0)
        fixed = {"memory": Matrix(), "objective": L2(), "rule": Gd(), "features": Identity(), "lr": 1.0}
        fixed |= {"step_size": 1.0, "chunk": 1, "read": "after", "write": "token", "normalized": False}
        check_fixed(self, {**fixed, "fade": "with", "forget": "all"})

    def learned_start(self, dim_k: int, dim_v: int) -> dict[str, Tensor]:
        return {key: torch.ones(dim_k) for key in self.constant_keys}

    def init_tokens(self, dim_k: int, dim_v: int, like: Tensor, learned: State) -> State:
        if self.period > 1:
            problem = "is not allowed on tokens: each of them both takes off and writes"
            raise FieldError(self.label, "period", self.period, problem)
        constants = {key: learned.get(key, like.new_ones(dim_k)) for key in self.constant_keys}
        return {**super().init_tokens(dim_k, dim_v, like, {}), **constants}

    def token_step(self, q: Tensor, k: Tensor, v: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        assert not isinstance(self.rate, Gate)  # as in every level that runs, it is a number by now
        before = state["memory"]["m"]
        ask, written = keys_of(k, self.rate, state)
        taken = torch.outer(matmul(before, ask), self.rate * ask)
        m = self.retention(before) - taken + torch.outer(v, written)
        return matmul(m, q), {**state, "memory": {"m": m}}


def keys_of(k: Tensor, rate: float | Tensor, constants: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return RWKV-7's κ̂, at which it takes off, and k̃, at which it writes."""
    return unit(k * constants["removal"]), k * (1 + (rate - 1) * constants["replacement"])


class Comba(GatedDeltanet):
    r"""Comba (Hu et al. 2025): gated DeltaNet with feedback of a strength of its own, in the write and in the read.

    $$p_t = \sigma(b)\, k_t, \qquad M_t = \alpha_t M_{t-1}(I - \eta_t p_t k_t^\top) + \eta_t v_t k_t^\top, \qquad
      y_t = M_t (q_t - d\, p_t)$$

    b (`feedback`) and d (`correction`) are learned by layers, one number for each head; b starts at 1. Other arguments:
    `gated_deltanet`; memory, objective, features, chunk and normalized stay at their defaults.

    Args:
        correction: d at the start. Default 1; the paper's authors take 0.02 for small models.
    """

    constant_keys: ClassVar[tuple[str, ...]] = ("feedback", "correction")

    correction: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("correction", 0.0)
        fixed = {"memory": Matrix(), "objective": L2(), "features": Identity(), "chunk": 1, "normalized": False}
        check_fixed(self, fixed)

    def learned_start(self, dim_k: int, dim_v: int) -> dict[str, Tensor]:
        return {"feedback": torch.ones(()), "correction": torch.tensor(float(self.correction))}

    def init_tokens(self, dim_k: int, dim_v: int, like: Tensor, learned: State) -> State:
        starts = {"feedback": like.new_ones(()), "correction": like.new_full((), self.correction)}
        return {**super().init_tokens(dim_k, dim_v, like, {}), **starts, **learned}

    def token_step(self, q: Tensor, k: Tensor, v: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        constants = {key: state[key] for key in self.constant_keys}
        own = {key: x for key, x in state.items() if key not in constants}
        y, new = super().token_step(*_fed_back(q, k, v, **constants), own, signal)
        return y, {**new, **constants}


def _fed_back(q: Tensor, k: Tensor, v: Tensor, feedback: Tensor, correction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return queries, keys and values for which gated DeltaNet is Comba.

    For $s = \sigma(b)$ the write $(v - s M k) k^\top$ is $(v/\sqrt s - M \sqrt s k)\,\sqrt s k^\top$.
    """
    share = feedback.sigmoid()
    return q - correction * share * k, share.sqrt() * k, v * share.rsqrt()


def check_fixed(level: Level, fixed: Mapping[str, object]) -> None:
    """Raise FieldError unless these fields hold these values."""
    for key, value in fixed.items():
        if getattr(level, key) != value:
            problem = f"is not allowed; it stays {value!r}: leave it out"
            raise FieldError(level.label, key, getattr(level, key), problem)


class Rwkv7Form(MatrixForm):
    """RWKV-7: a diagonal and a matrix of rank one for each token."""

    levels: ClassVar[tuple[type[Level], ...]] = (Rwkv7,)
    own = Rwkv7
    level: Rwkv7

    @classmethod
    def accepts(cls, level: Level, device: torch.device, dtype: torch.dtype) -> Accepted | Refused:
        assert isinstance(level, Rwkv7)
        why = overridden(level, Rwkv7)
        if not why and type(level.retention) not in (Keep, Decay):
            why = f"retention={level.retention.label}: keep and decay are computed"
        numbers = {"rate": level.rate, "retention's keep": getattr(level.retention, "keep", None)}
        for name, value in numbers.items():
            if not why and not is_number(value):
                why = f"{name} is a tensor with a shape"
        return Refused(why) if why else Accepted("a diagonal less a matrix of rank one, exact and parallel in chunks")

    def forward(self, tokens: TokenBatch, gates: Mapping[str, Tensor], state: State) -> tuple[Tensor, State]:
        x, made = self._written(tokens, gates, state["level"])
        before = state["level"]["memory"]["m"]
        y, memory = over_segments(partial(rank_one_scan, read="after"), x, made, before, chunk_for(x.k))
        return y, self._after(state, tokens, memory)

    def step(self, tokens: TokenBatch, gates: Mapping[str, Tensor], state: State) -> tuple[Tensor, State]:
        x, made = self._written(tokens, gates, state["level"])
        before = state["level"]["memory"]["m"]
        taken = matmul(made["ask"], before.mT)
        memory = kept(before, x, made) - taken.mT * made["along"] + x.v.mT * x.k
        return matmul(x.q, memory.mT), self._after(state, tokens, memory)

    def _written(
        self, tokens: TokenBatch, gates: Mapping[str, Tensor], level: State
    ) -> tuple[TokenBatch, dict[str, Tensor]]:
        """Return the tokens with the keys that they are written along, and what `rank_one_scan` takes beside them."""
        rate = tokens.gate(self.number(self.level.rate, "rate", gates, tokens.k), 1.0)
        rate = rate if rate.ndim == 4 else rate[..., None]
        ask, written = keys_of(tokens.k, rate, {key: level[key][:, :, None] for key in self.level.constant_keys})
        decay = self.decays(gates, tokens.k) or {"decay": tokens.k.new_ones(1, 1, 1)}
        return tokens.replace(k=written), {"ask": ask, "along": rate * ask, **decay}

    def _after(self, state: State, tokens: TokenBatch, memory: Tensor) -> State:
        return {"step": state["step"] + tokens.length, "level": {**state["level"], "memory": {"m": memory}}}


class CombaForm(DeltaRuleForm):
    """Comba: the delta rule on queries, keys and values that have its feedback in them."""

    levels: ClassVar[tuple[type[Level], ...]] = (Comba,)
    own = Comba

    def forward(self, tokens: TokenBatch, gates: Mapping[str, Tensor], state: State) -> tuple[Tensor, State]:
        return super().forward(self._fed_back(tokens, state["level"]), gates, state)

    def step(self, tokens: TokenBatch, gates: Mapping[str, Tensor], state: State) -> tuple[Tensor, State]:
        return super().step(self._fed_back(tokens, state["level"]), gates, state)

    def _fed_back(self, tokens: TokenBatch, level: State) -> TokenBatch:
        constants = {key: level[key][:, :, None, None] for key in self.level.constant_keys}
        q, k, v = _fed_back(tokens.q, tokens.k, tokens.v, **constants)
        return tokens.replace(q=q, k=k, v=v)
