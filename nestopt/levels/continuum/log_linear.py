"""The log-linear memory: matrix memories of spans that double, older the longer, as a binary counter keeps them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from nestopt.core.device import number_like
from nestopt.core.level import Level
from nestopt.core.part import FieldError, Gate
from nestopt.core.precision import matmul
from nestopt.core.retentions import Decay, Keep, Retention
from nestopt.core.signal import Signal
from nestopt.core.token_batch import TokenBatch
from nestopt.core.token_form import Accepted, Refused, TokenForm
from nestopt.core.tree import State
from nestopt.kernels.products import logarithm, products
from nestopt.levels.closed_form import is_number, overridden
from nestopt.levels.matrix.segments import chunk_for


def _halves(levels: int) -> dict[str, Retention]:
    return {f"l{i}": Decay(Gate(0.5)) for i in range(levels + 1)}


class LogLinear(Level):
    r"""Log-linear attention (Guo et al. 2025): a continuum of matrix memories, of spans 1, 2, 4, … tokens.

    Before token t the past is cut at the ones of t in binary, the longest span first: of a one at bit b there is a
    memory $S^{(b)}$ of $2^b$ tokens. With $S^{(-1)} = v_t k_t^\top$ the token itself, all fading by α,

    $$y_t = \sum_{b \ge -1} \lambda_t^{(b+1)} S_t^{(b)} q_t$$

    After the token memories are added as a binary counter carries. The last of the `levels` memories takes all that is
    older, so that any length will do; $2^{\mathrm{levels}-1}$ tokens are cut as the paper has it. With all λ alike it
    is `gated_linear`. Layers L2-normalise queries and keys for it. On gradients the direction is
    $\sum_b\lambda^{(b+1)} S^{(b)}$ of sums of gradients.

    Args:
        levels: how many memories, 1 to 32. Default 12.
        retention: `keep`, or `decay` (default), whose share α is a gate that starts at 0.99.
        weights: λ by the names l0, l1, … up to `levels`: `keep` of a `decay` each; gates in (0, 1) that start at ½.
    """

    qk_norm: ClassVar[bool] = True
    reads_param: ClassVar[bool] = False
    objectives: ClassVar[dict[str, str]] = {"slots": "dot"}

    levels: int = 12
    retention: Retention = dataclasses.field(default_factory=lambda: Decay(Gate(0.99)))
    weights: dict[str, Retention] = dataclasses.field(default_factory=lambda: _halves(12))

    def __post_init__(self) -> None:
        if isinstance(self.levels, bool) or not isinstance(self.levels, int) or not 1 <= self.levels <= 32:
            raise FieldError(self.label, "levels", self.levels, "is not allowed; give a whole number from 1 to 32")
        if self.weights == _halves(12):
            self.weights = _halves(self.levels)
        super().__post_init__()
        names = list(_halves(self.levels))
        if list(self.weights) != names or not all(type(part) is Decay for part in self.weights.values()):
            problem = f"is not allowed; give a decay for each of {names[0]} to {names[-1]}, or leave it out"
            raise FieldError(self.label, "weights", self.weights, problem)
        self.retention.check_memory(self)

    def init(self, param: Tensor) -> State:
        return {"slots": param.new_zeros(self.levels, *param.shape)}

    def step(self, grad: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        kept = self.retention(state["slots"])
        weights = torch.stack([number_like(part.keep, grad) for part in self.weights.values()])  # type: ignore[attr-defined]
        direction = weights[0] * grad + torch.tensordot(weights[1:], kept, 1)
        return direction, {"slots": carried(kept, grad, signal.step, 0)}


def carried(slots: Tensor, new: Tensor, step: int | Tensor, dim: int) -> Tensor:
    """Add a memory `new` `[..]` to `slots` `[.., L, ..]` (at `dim`) as a counter that comes to `step` carries.

    It takes with it all slots below the lowest one of `step`; the last slot is never emptied.
    """
    count = slots.shape[dim]
    powers = 2 ** torch.arange(count, device=slots.device)
    rest = (1,) * (slots.ndim - dim - 1)
    lowest: Tensor | int
    if isinstance(step, int):
        lowest = min(step & -step, 2 ** (count - 1))
    else:
        step = step.long()  # a count that a device keeps is a float
        lowest = (step & -step).clamp_max(2 ** (count - 1))[..., None]
    below, here = ((mask).unflatten(-1, (count, *rest)) for mask in (powers < lowest, powers == lowest))
    total = new + torch.where(below, slots, 0).sum(dim)
    return torch.where(below, 0, slots) + torch.where(here, total.unsqueeze(dim), 0)


def bit_length(x: Tensor, bits: int) -> Tensor:
    """Return how many binary digits each of x has, whole numbers below 2 ** bits: of a span apart, its level."""
    return (x[..., None] >> torch.arange(bits, device=x.device) > 0).sum(-1)


class LogLinearForm(TokenForm):
    """Chunks in which all is computed at once; between them the counter of longer memories, and a read of each."""

    levels: ClassVar[tuple[type[Level], ...]] = (LogLinear,)
    level: LogLinear

    @classmethod
    def accepts(cls, level: Level, device: torch.device, dtype: torch.dtype) -> Accepted | Refused:
        assert isinstance(level, LogLinear)
        why = overridden(level, LogLinear)
        if not why and level.period > 1:
            why = f"period={level.period}: it sums gradients on a clock"
        if not why and type(level.retention) not in (Keep, Decay):
            why = f"retention={level.retention.label}: keep and decay are computed"
        parts = (level.retention, *level.weights.values())
        if not why and not all(is_number(getattr(part, "keep", None)) for part in parts):
            why = "a number of it is a tensor with a shape"
        return Refused(why) if why else Accepted("matrix memories of doubling spans, parallel within chunks")

    def forward(self, tokens: TokenBatch, gates: Mapping[str, Tensor], state: State) -> tuple[Tensor, State]:
        y, slots = log_linear_scan(
            tokens, *self._numbers(tokens, gates), state["level"]["slots"], state["step"], chunk_for(tokens.k)
        )
        return y, {"step": state["step"] + tokens.count, "level": {"slots": slots}}

    def step(self, tokens: TokenBatch, gates: Mapping[str, Tensor], state: State) -> tuple[Tensor, State]:
        before, (log_keep, weights) = state["level"]["slots"], self._numbers(tokens, gates)
        kept = before * log_keep.exp()[..., None, None]
        new, active = tokens.v.mT @ tokens.k, tokens.active
        y = _read(tokens.q, weights[..., 1:], kept) + weights[..., :1] * matmul(tokens.q, new.mT)
        after = torch.where(active[..., None, None], carried(kept, new, state["step"] + 1, 2), before)
        return y, {"step": state["step"] + tokens.count, "level": {"slots": after}}

    def read(self, tokens: TokenBatch, gates: Mapping[str, Tensor], state: State) -> Tensor:
        log_keep, weights = self._numbers(tokens, gates)
        return _read(tokens.q * log_keep.exp()[..., None], weights[..., 1:], state["level"]["slots"])

    def _numbers(self, tokens: TokenBatch, gates: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Log α `[B, H, T]`, 0 where a token is not active, and λ `[B, H, T, levels + 1]`."""
        keep, like = tokens.v.new_ones(1), tokens.v
        if isinstance(self.level.retention, Decay):
            keep = self.number(self.level.retention.keep, "retention.keep", gates, like)
        every = [
            self.number(part.keep, f"weights.{name}.keep", gates, like).expand(tokens.active.shape)  # type: ignore[attr-defined]
            for name, part in self.level.weights.items()
        ]
        return logarithm(tokens.gate(keep, 1.0)), torch.stack(every, dim=-1)


def _read(q: Tensor, weights: Tensor, slots: Tensor) -> Tensor:
    """Sum what slots `[.., L, D_v, D_k]` answer to q `[.., T, D_k]` with `weights` `[.., T, L]`: `[.., T, D_v]`."""
    asked = (weights[..., None] * q[..., None, :]).flatten(-2)
    return matmul(asked, slots.transpose(-1, -2).flatten(-3, -2))


def log_linear_scan(
    x: TokenBatch, log_keep: Tensor, weights: Tensor, slots: Tensor, count: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """Answer tokens `[B, H, T, D_v]` that come after `count` `[B, H]` others; and the slots after them.

    Each row and head is laid out so that its chunks begin at its own multiples of the chunk: up to one more than T has.

    Args:
        x: the tokens.
        log_keep: log α `[B, H, T]`, 0 where a token is not active.
        weights: λ `[B, H, T, L + 1]`.
        slots: `[B, H, L, D_v, D_k]`.
        count: tokens written before.
        chunk: tokens computed at once, a power of 2; fewer where there are few levels.
    """
    size = min(chunk, 2 ** (slots.shape[2] - 1))
    bits, length = size.bit_length() - 1, x.k.shape[2]
    chunks = (length + 2 * size - 2) // size
    first, width = count % size, chunks * size
    place = torch.where(x.active, first[..., None] + x.active.cumsum(2) - 1, width)

    def laid(part: Tensor) -> Tensor:
        """`[B, H, T, ..]` at each token's place, `[B, H, N, C, ..]`, 0 elsewhere."""
        at = place.reshape(*place.shape, *(1,) * (part.ndim - 3)).expand_as(part)
        whole = part.new_zeros(*part.shape[:2], width + 1, *part.shape[3:]).scatter(2, at, part)
        return whole[:, :, :width].unflatten(2, (chunks, size))

    q, k, v, weights = (laid(part) for part in (x.q, x.k, x.v, weights))
    left, since = products(laid(log_keep))  # Γ [.., C, C] and γ [.., C]
    here = torch.arange(size, device=k.device)
    apart = bit_length(here[:, None] ^ here, bits)  # the level of each token before another
    scores = matmul(q, k.mT) * left * weights.gather(-1, apart.expand(*weights.shape[:-1], size))
    y = matmul(scores, v)
    # the memories of the chunk that is begun: each is within one span of every token to come
    short, long = slots.split([bits, slots.shape[2] - bits], dim=2)
    powers = torch.arange(bits, device=k.device)
    starts = first[..., None] >> (powers + 1) << (powers + 1)
    own = weights[:, :, 0].gather(-1, apart[starts].mT)
    y = torch.cat([y[:, :, :1] + _read(q[:, :, 0] * since[:, :, 0, :, None], own, short)[:, :, None], y[:, :, 1:]], 2)
    # chunks that are over, and the counter of them
    sums = matmul((v * left[..., -1, :, None]).mT, k)
    sums = torch.cat([sums[:, :, :1] + (since[:, :, 0, -1, None, None] * short.sum(2))[:, :, None], sums[:, :, 1:]], 2)
    end = first + x.active.sum(2)
    begun = []
    for n, total in enumerate(sums.unbind(2)):
        begun.append(long)
        kept = long * since[:, :, n, -1, None, None, None]
        over = ((n + 1) * size <= end)[..., None, None, None]
        long = torch.where(over, carried(kept, total, count // size + n + 1, 2), kept)
    y = y + _read(q * since[..., None], weights[..., bits + 1 :], torch.stack(begun, dim=2))
    short = _begun(short, starts, k, v, left[..., -1, :], since[:, :, 0, -1], end, apart)
    y = y.flatten(2, 3)
    y = y.gather(2, place.clamp_max(width - 1)[..., None].expand(*place.shape, y.shape[-1]))
    return torch.where(x.active[..., None], y, 0.0), torch.cat([short, long], dim=2)


def _begun(
    short: Tensor, starts: Tensor, k: Tensor, v: Tensor, left: Tensor, since: Tensor, end: Tensor, apart: Tensor
) -> Tensor:
    """Return the memories of the chunk that is not over, `[B, H, bits, D_v, D_k]`, after `end` `[B, H]` of its places.

    They are of its tokens, and of `short`, those before this call, if the chunk is the first.
    """
    chunks, size, bits = *k.shape[2:4], short.shape[2]
    last, rest = end // size, end % size
    at = last.clamp_max(chunks - 1)[..., None, None, None]
    k, v = (part.gather(2, at.expand(*at.shape[:3], *part.shape[3:]))[:, :, 0] for part in (k, v))
    left = left.gather(2, at[..., 0].expand(*at.shape[:3], size))[:, :, 0]
    span = torch.arange(1, bits + 1, device=k.device)[:, None]
    levels = apart[rest]  # of each place, as the next token will see it
    tokens = (levels[:, :, None] == span) & (torch.arange(size, device=k.device) < rest[..., None, None])
    new = matmul(v.mT[:, :, None], (tokens * left[:, :, None])[..., None] * k[:, :, None])
    older = (levels.gather(-1, starts)[:, :, None] == span) & ((last == 0) & (rest > 0))[..., None, None]
    held = (older * since[..., None, None]).to(short.dtype)
    return new + torch.einsum("bhij,bhjvk->bhivk", held, short)
