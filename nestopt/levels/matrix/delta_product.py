"""DeltaProduct: several corrections of a matrix memory by each token."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from nestopt.core.associative import AssociativeMemory, Gd
from nestopt.core.features import Identity
from nestopt.core.level import Level
from nestopt.core.memories import Matrix, Theta
from nestopt.core.objectives import L2
from nestopt.core.outputs import Plain
from nestopt.core.part import Channels, FieldError, Gate, Number, Several
from nestopt.core.precision import matmul
from nestopt.core.retentions import Decay, Keep
from nestopt.core.signal import Signal
from nestopt.core.token_batch import TokenBatch
from nestopt.core.token_form import Accepted, Refused
from nestopt.core.tree import State
from nestopt.kernels.unit import unit
from nestopt.levels.closed_form import is_number, overridden
from nestopt.levels.matrix.chunk_matrix import GateShares, answers, corrected, shares
from nestopt.levels.matrix.corrective import check_fixed
from nestopt.levels.matrix.form import MatrixForm, kept
from nestopt.levels.matrix.segments import chunk_for, chunks_of, gate_chunks, log_gate, over_segments
from nestopt.levels.presets import Deltanet


class Deltaproduct(Deltanet):
    r"""DeltaProduct (Siems et al. 2025): a matrix memory that each token corrects n times, at n keys.

    $$M_t = \alpha_t M_{t-1} \prod_{i=1}^{n}(I - \eta_{t,i} k_{t,i} k_{t,i}^\top) + \dots, \qquad
      y_t = (M_t q_{t,1}, \dots, M_t q_{t,n})$$

    written one after the other, $M \leftarrow M + \eta_{t,i}(v_{t,i} - M k_{t,i}) k_{t,i}^\top$. The n keys, values and
    queries, and what is read, lie side by side in those of the token: M is `[D_v / n, D_k / n]`, and heads of width
    n D have the paper's memory of D. Keys and queries are each L2-normalised. With n reflections a token turns the
    memory as a rotation does, which tracking a state needs.

    Args:
        writes: n, which divides the widths of keys and values. Default 2.
        lr: η, in (0, 2) so that eigenvalues reach -1; as a gate it is one for each of the n writes. It starts at ½.

    Other arguments: `associative_memory`; the retention is `keep` or a decay of heads, and acts once a token, before
    its writes; `read` may be `"before"`. Others stay at their defaults. On gradients it is `deltanet`.
    """

    qk_norm: ClassVar[bool] = False

    lr: Number = Several(Gate(0.5, 0.0, 2.0), 2)
    writes: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("writes", 1)
        self.check("lr", 0.0, 2.0)
        if isinstance(self.lr, Gate) and type(self.lr) in (Gate, Several):
            self.lr = Several(self.lr, self.writes)
        fixed: dict[str, object] = {
            "memory": Matrix(),
            "objective": L2(),
            "rule": Gd(),
            "features": Identity(),
            "output": Plain(),
        }
        fixed |= {"step_size": 1.0, "chunk": 1, "write": "token", "normalized": False, "fade": "with", "forget": "all"}
        check_fixed(self, fixed)
        if isinstance(getattr(self.retention, "keep", None), Channels):
            raise FieldError(
                self.label, "retention", self.retention, "is not allowed; give a number or a Gate for keep"
            )

    def init_tokens(self, dim_k: int, dim_v: int, like: Tensor, learned: State) -> State:
        if self.period > 1:
            raise FieldError(self.label, "period", self.period, "is not allowed on tokens: each is several writes")
        for name, dim in (("keys", dim_k), ("values", dim_v)):
            if dim % self.writes:
                problem = f"is not allowed for {name} of {dim} numbers; give a number that divides it"
                raise FieldError(self.label, "writes", self.writes, problem)
        return super().init_tokens(dim_k // self.writes, dim_v // self.writes, like, learned)

    def token_step(self, q: Tensor, k: Tensor, v: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        keys, values = unit(self._parts(k)), self._parts(v)
        rates = torch.as_tensor(self.lr, dtype=k.dtype, device=k.device).expand(self.writes)
        m = self.retention(state["memory"]["m"])
        for key, value, rate in zip(keys.unbind(), values.unbind(), rates.unbind(), strict=True):
            m = m + rate * torch.outer(value - matmul(m, key), key)
        new = {"m": m}
        return self._answer(new if self.read == "after" else state["memory"], q), {**state, "memory": new}

    def _parts(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.writes, -1))

    def _answer(self, theta: Theta, q: Tensor) -> Tensor:
        return self.memory.read(theta, unit(self._parts(q))).flatten(-2)

    def error(self, theta: Theta, k: Tensor, v: Tensor) -> Tensor:
        return self._answer(theta, k) - v


class DeltaproductForm(MatrixForm):
    """The delta rule on the writes of all tokens, one after the other, read after the last of each token."""

    levels: ClassVar[tuple[type[Level], ...]] = (Deltaproduct,)
    own: ClassVar[type[AssociativeMemory]] = Deltaproduct
    level: Deltaproduct

    @classmethod
    def accepts(cls, level: Level, device: torch.device, dtype: torch.dtype) -> Accepted | Refused:
        assert isinstance(level, Deltaproduct)
        why = overridden(level, Deltaproduct)
        if not why and type(level.retention) not in (Keep, Decay):
            why = f"retention={level.retention.label}: keep and decay are computed"
        for name, value in {"lr": level.lr, "retention's keep": getattr(level.retention, "keep", None)}.items():
            if not why and not is_number(value):
                why = f"{name} is a tensor with a shape"
        return Refused(why) if why else Accepted("the delta rule, several writes a token, exact and parallel in chunks")

    def forward(self, tokens: TokenBatch, gates: Mapping[str, Tensor], state: State) -> tuple[Tensor, State]:
        x, made = self._units(tokens), {"lr": self._rates(tokens, gates), **self.decays(gates, tokens.k)}
        run = partial(product_scan, read=self.reads, writes=self.level.writes)
        size = max(1, chunk_for(x.k) // self.level.writes)
        y, memory = over_segments(run, x, made, state["level"]["memory"]["m"], size, rows=self.level.writes)
        return y, self._after(state, tokens, memory)

    def step(self, tokens: TokenBatch, gates: Mapping[str, Tensor], state: State) -> tuple[Tensor, State]:
        x, count = self._units(tokens), self.level.writes
        before = state["level"]["memory"]["m"]
        q, k, v = (part.unflatten(-1, (count, -1)) for part in (x.q, x.k, x.v))
        rates, memory = self._rates(tokens, gates), kept(before, x, self.decays(gates, tokens.k))
        for i in range(count):
            key, value = k[..., i, :], v[..., i, :]
            error = rates[..., i : i + 1] * (value - matmul(key, memory.mT))
            memory = torch.addcmul(memory, error.mT, key)
        seen = memory if self.reads == "after" else before
        return matmul(q[:, :, 0], seen.mT).flatten(-2)[:, :, None], self._after(state, tokens, memory)

    def _units(self, tokens: TokenBatch) -> TokenBatch:
        """Return the tokens with each of their queries and keys L2-normalised."""
        split = [x.unflatten(-1, (self.level.writes, -1)) for x in (tokens.q, tokens.k)]
        q, k = (unit(x).flatten(-2) for x in split)
        return tokens.replace(q=q, k=k)

    def _rates(self, tokens: TokenBatch, gates: Mapping[str, Tensor]) -> Tensor:
        """η `[B, H, T, n]`, 0 where a token is not active."""
        lr = tokens.gate(self.number(self.level.lr, "lr", gates, tokens.k), 0.0)
        return lr if lr.ndim == 4 else lr[..., None].expand(*lr.shape, self.level.writes)

    def _after(self, state: State, tokens: TokenBatch, memory: Tensor) -> State:
        return {"step": state["step"] + tokens.length, "level": {**state["level"], "memory": {"m": memory}}}


def product_scan(
    x: TokenBatch, gates: Mapping[str, Tensor], memory: Tensor, size: int, *, read: str, writes: int
) -> tuple[Tensor, Tensor]:
    """Run over whole chunks of `size` tokens of n writes, from M: y `[B, H, T, n D_v]` and M after them.

    `x` has n queries, keys and values side by side in each token; `gates["lr"]` is `[B, H, T, n]`.
    """
    rows = [part.unflatten(-1, (writes, -1)).flatten(2, 3) for part in (x.q, x.k, x.v)]
    q, k, v = (chunks_of(part, size * writes) for part in rows)
    log_decay = log_gate(x, gates, "decay", size)
    if log_decay is not None:  # before the first write of a token
        log_decay = F.pad(log_decay[..., None], (0, writes - 1)).flatten(-2)
    after = shares(log_decay, k)
    lr = gate_chunks(gates["lr"].flatten(-2), size * writes)
    u, begun, memory = corrected(k, v, lr, after, (after.last(),), memory)
    times, at = (
        (after, slice(writes - 1, None, writes)) if read == "after" else (after.before(), slice(0, None, writes))
    )
    seen = GateShares(times.writes[..., at, :], None if times.memory is None else times.memory[..., at])
    y = answers(q, k, u, seen.repeated(writes, 1), begun)
    return y.flatten(2, 3).unflatten(2, (-1, writes)).flatten(-2), memory
