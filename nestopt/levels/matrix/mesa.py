"""Mesa: a matrix memory that is, at every token, the exact ridge regression of all pairs so far."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nestopt.core.level import Level
from nestopt.core.memories import rows
from nestopt.core.part import FINITE, FieldError, Gate, Number
from nestopt.core.precision import matmul
from nestopt.core.retentions import Decay, Keep, Retention
from nestopt.core.signal import Signal
from nestopt.core.token_batch import TokenBatch
from nestopt.core.token_form import Accepted, Refused, TokenForm
from nestopt.core.tree import State
from nestopt.levels.closed_form import is_number, overridden
from nestopt.levels.matrix.chunk_matrix import GateShares, added, answers, shares
from nestopt.levels.matrix.segments import chunk_for, chunks_of, log_gate, over_segments, rates
from nestopt.levels.matrix.solve import factorised, solved

ABOVE = 0.75
"""Λ starts so far above its least value."""

START = math.log(math.expm1(ABOVE))


class Mesa(Level):
    r"""The mesa layer (MesaNet, von Oswald et al. 2025): the matrix that regresses all pairs so far best.

    $$G_t = \alpha_t G_{t-1} + \eta_t v_t k_t^\top, \quad H_t = \alpha_t H_{t-1} + \eta_t k_t k_t^\top, \qquad
      y_t = G_t\,(H_t + \Lambda)^{-1} q_t$$

    $G(H + \Lambda)^{-1}$ minimises $\sum_s w_s\lVert M k_s - v_s\rVert^2 + \mathrm{tr}\,M\Lambda M^\top$ with w what
    gates leave of η: Newton's step, of which DeltaNet takes the gradient's. The system is solved by conjugate gradients
    from 0, whose error after n steps is at most $2\big(\frac{\sqrt\kappa-1}{\sqrt\kappa+1}\big)^n$ of the solution
    (in the norm of the system), $\kappa \le (\max\Lambda + \sum_s w_s\lVert k_s\rVert^2)/\min\Lambda$. Layers
    L2-normalise queries and keys for it, and learn Λ per head and channel.

    On gradients keys are rows, as those of a matrix memory, Λ is at its start, and the direction is
    $G(H + \Lambda)^{-1}$ itself, solved exactly: `regression_optimum(side="right", target=0)` is its kin there.

    Args:
        lr: η, a gate in (0, 1) that starts at ½.
        retention: `keep`, or `decay` (default), whose share α is a gate that starts at 0.97.
        floor: the least that Λ may be, above 0; Λ is that and a softplus, and starts at `floor` + ¾. Default ¼.
        solver: `"cg"` (default), or `"exact"`: by a factorisation for each token.
        steps: of conjugate gradients, 1 or more. Default 30.
    """

    qk_norm: ClassVar[bool] = True
    constant_keys: ClassVar[tuple[str, ...]] = ("ridge",)
    requires: ClassVar[frozenset[str]] = frozenset({"shape", FINITE})
    reads_param: ClassVar[bool] = False
    objectives: ClassVar[dict[str, str]] = {"g": "l2", "h": "l2"}

    lr: Number = Gate(0.5)
    retention: Retention = dataclasses.field(default_factory=lambda: Decay(Gate(0.97)))
    floor: float = 0.25
    solver: Literal["cg", "exact"] = "cg"
    steps: int = 30

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("lr", 0.0)
        self.check("floor", 0.0, closed="()")
        self.check("steps", 1)
        self.check_choice("solver", ("cg", "exact"))
        self.retention.check_memory(self)

    # -- on gradients ----------------------------------------------------------------------------------------------

    def init(self, param: Tensor) -> State:
        width = rows(param).shape[-1]
        return {"g": torch.zeros_like(rows(param)), "h": param.new_zeros(width, width)}

    def step(self, grad: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        keys = rows(grad)
        new = self._written(state, keys, torch.eye(len(keys), dtype=keys.dtype, device=keys.device))
        system = new["h"] + (self.floor + ABOVE) * torch.eye(keys.shape[-1], dtype=keys.dtype, device=keys.device)
        return factorised(system, new["g"]).reshape(grad.shape), new

    def _written(self, state: State, k: Tensor, v: Tensor) -> State:
        """Return G and H with pairs `[n, D]` in them."""
        lr, kept = self.lr, {name: self.retention(state[name]) for name in ("g", "h")}
        return {"g": kept["g"] + lr * matmul(v.mT, k), "h": kept["h"] + lr * matmul(k.mT, k)}  # type: ignore[operator]

    # -- on tokens -------------------------------------------------------------------------------------------------

    def learned_start(self, dim_k: int, dim_v: int) -> dict[str, Tensor]:
        return {"ridge": torch.full((dim_k,), START)}

    def init_tokens(self, dim_k: int, dim_v: int, like: Tensor, learned: State) -> State:
        if self.period > 1:
            problem = "is not allowed on tokens: it learns at every one; leave it out"
            raise FieldError(self.label, "period", self.period, problem)
        ridge = learned["ridge"] if learned else like.new_full((dim_k,), START)
        return {"g": like.new_zeros(dim_v, dim_k), "h": like.new_zeros(dim_k, dim_k), "ridge": ridge}

    def token_step(self, q: Tensor, k: Tensor, v: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        new = {**self._written(state, k[None], v[None]), "ridge": state["ridge"]}
        return self.token_read(q, len(v), new, signal), new

    def token_read(self, q: Tensor, dim_v: int, state: State, signal: Signal) -> Tensor:
        return read(self, q[None], state["g"], state["h"], self.ridge(state["ridge"]))[0]

    def ridge(self, raw: Tensor) -> Tensor:
        """Λ `[.., D_k]` of what a layer learns."""
        return self.floor + F.softplus(raw)


def read(level: Mesa, q: Tensor, g: Tensor, h: Tensor, ridge: Tensor) -> Tensor:
    """Answer queries `[.., n, D_k]` from G `[.., D_v, D_k]`, H `[.., D_k, D_k]` and Λ `[.., D_k]`: `[.., n, D_v]`."""
    if level.solver == "exact":
        return matmul(factorised(h + torch.diag_embed(ridge), q), g.mT)
    return matmul(solved(_dense, q, level.steps, h, ridge[..., None, :]), g.mT)


def _dense(p: Tensor, h: Tensor, ridge: Tensor) -> Tensor:
    return torch.addcmul(p @ h, ridge, p)


def _by_chunks(p: Tensor, k: Tensor, weights: Tensor, since: Tensor, h: Tensor, ridge: Tensor) -> Tensor:
    """(H_t + Λ) p_t for each token: what is left of H, and of the pairs of the chunk."""
    return torch.addcmul((p @ k.mT * weights) @ k + (p * since[..., None]) @ h, ridge, p)


class MesaForm(TokenForm):
    """Solve for all tokens of all chunks at once; a step is two products with the pairs, and one with H."""

    levels: ClassVar[tuple[type[Level], ...]] = (Mesa,)
    level: Mesa

    @classmethod
    def accepts(cls, level: Level, device: torch.device, dtype: torch.dtype) -> Accepted | Refused:
        assert isinstance(level, Mesa)
        why = overridden(level, Mesa)
        if not why and type(level.retention) not in (Keep, Decay):
            why = f"retention={level.retention.label}: keep and decay are computed"
        if not why and not (is_number(level.lr) and is_number(getattr(level.retention, "keep", None))):
            why = "a number of it is a tensor with a shape"
        words = "an exact solution" if level.solver == "exact" else f"{level.steps} steps of conjugate gradients"
        return Refused(why) if why else Accepted(f"{words}, parallel within chunks")

    def forward(self, tokens: TokenBatch, gates: Mapping[str, Tensor], state: State) -> tuple[Tensor, State]:
        before, made = state["level"], self._numbers(tokens, gates)
        run = partial(mesa_scan, level=self.level, ridge=self.level.ridge(before["ridge"])[:, :, None, None])
        both = torch.cat([before["g"], before["h"]], dim=-2)
        y, both = over_segments(run, tokens, made, both, chunk_for(tokens.k))
        g, h = both.split([tokens.v.shape[-1], tokens.k.shape[-1]], dim=-2)
        return y, {"step": state["step"] + tokens.length, "level": {**before, "g": g, "h": h}}

    def step(self, tokens: TokenBatch, gates: Mapping[str, Tensor], state: State) -> tuple[Tensor, State]:
        before, made = state["level"], self._numbers(tokens, gates)
        keep = tokens.gate(made["decay"], 1.0)[..., None] if "decay" in made else 1.0
        k = tokens.k * tokens.gate(made["lr"], 0.0)[..., None]
        g, h = torch.addcmul(before["g"] * keep, tokens.v.mT, k), torch.addcmul(before["h"] * keep, tokens.k.mT, k)
        y = read(self.level, tokens.q, g, h, self.level.ridge(before["ridge"]))
        return y, {"step": state["step"] + tokens.length, "level": {**before, "g": g, "h": h}}

    def read(self, tokens: TokenBatch, gates: Mapping[str, Tensor], state: State) -> Tensor:
        now = state["level"]
        return read(self.level, tokens.q, now["g"], now["h"], self.level.ridge(now["ridge"]))

    def _numbers(self, tokens: TokenBatch, gates: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """η, and α if anything fades."""
        made = {"lr": self.number(self.level.lr, "lr", gates, tokens.k)}
        if isinstance(self.level.retention, Decay):
            made["decay"] = self.number(self.level.retention.keep, "retention.keep", gates, tokens.k)
        return made


def mesa_scan(
    x: TokenBatch, gates: Mapping[str, Tensor], memory: Tensor, size: int, *, level: Mesa, ridge: Tensor
) -> tuple[Tensor, Tensor]:
    """Run over whole chunks, from G and H one below the other, `[B, H, D_v + D_k, D_k]`, with Λ `[B, H, 1, 1, D_k]`."""
    queries, keys, values = (chunks_of(part, size) for part in (x.q, x.k, x.v))
    after, lr = shares(log_gate(x, gates, "decay", size), keys), rates(x, gates, size)
    begun, memory = added(keys, torch.cat([values, keys], dim=-1) * lr[..., None], after.last(), memory)
    g, h = begun.split([values.shape[-1], keys.shape[-1]], dim=-2)
    weights = after.writes * lr[..., None, :]
    since = torch.ones_like(lr) if after.memory is None else after.memory.expand_as(lr)
    if level.solver == "exact":
        each = since[..., None, None] * h[:, :, :, None] + torch.einsum(
            "...ts,...sd,...se->...tde", weights, keys, keys
        )
        found = factorised(each + torch.diag_embed(ridge), queries[..., None, :])[..., 0, :]
    else:
        found = solved(_by_chunks, queries, level.steps, keys, weights, since, h, ridge)
    return answers(found, keys, values, GateShares(weights, after.memory), g).flatten(2, 3), memory
