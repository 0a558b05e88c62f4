r"""Matrix memories on tokens, exact and parallel within chunks, whatever the rule of their decays and momenta.

Within a chunk that begins with a memory $M_0$ and a momentum $S_0$, every linear recurrence of rank-one writes is

$$M_t = \gamma_t M_0 + c_t S_0 + \sum_s \kappa_{ts}\, u_s k_s^\top$$

with shares γ, c, κ that only the gates decide. Without an error to correct (linear attention) the $u_s$ are the values;
with one (the delta rule) they solve one unit lower triangular system a chunk. Layout: `[B, H, N, C, D]`, N chunks of C.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from nestopt.core.precision import matmul, plus_matmul
from nestopt.kernels.products import products, shifted
from nestopt.levels.matrix.corrections import corrections


@dataclasses.dataclass(frozen=True)
class GateShares:
    """Of what a memory is made at some times of a chunk; leading dimensions `[B or 1, H or 1, N or 1]`.

    Attributes:
        writes: κ `[.., X, C]`, of each write of the chunk.
        memory: γ `[.., X]`, of the memory that the chunk began with; None where all is kept of it and of every write.
        momentum: c `[.., X]`, of the momentum that it began with; None without momentum.
    """

    writes: Tensor
    memory: Tensor | None
    momentum: Tensor | None = None

    def before(self) -> GateShares:
        """At the time before each."""
        memory = None if self.memory is None else shifted(self.memory[..., None], 1.0)[..., 0]
        momentum = None if self.momentum is None else shifted(self.momentum[..., None])[..., 0]
        return GateShares(shifted(self.writes), memory, momentum)

    def times(self, decay: Tensor) -> GateShares:
        """Return the shares of that memory times a number `[.., X]`."""
        memory, momentum = (None if x is None else x * decay for x in (self.memory, self.momentum))
        return GateShares(self.writes * decay[..., None], memory, momentum)

    def repeated(self, times: int, writes: int) -> GateShares:
        """Return the shares where each time counts as some, each write as some that happen at once."""
        memory, momentum = (None if x is None else x.repeat_interleave(times, -1) for x in (self.memory, self.momentum))
        return GateShares(self.writes.repeat_interleave(times, -2).repeat_interleave(writes, -1), memory, momentum)

    def last(self) -> GateShares:
        """At the end of the chunk: X = 1."""
        memory = None if self.memory is None else self.memory[..., -1:]
        momentum = None if self.momentum is None else self.momentum[..., -1:]
        return GateShares(self.writes[..., -1:, :], memory, momentum)


def shares(log_decay: Tensor | None, like: Tensor) -> GateShares:
    """Return those of $M_t = a_t M_{t-1} + u_t k_t^T$, from logarithms `[.., C]` (None is 0), for keys `like`."""
    if log_decay is None:
        return GateShares(like.new_ones(like.shape[-2], like.shape[-2]).tril()[None, None, None], None)
    return GateShares(*products(log_decay))


def shares_with_momentum(
    log_decay: Tensor | None, log_momentum: Tensor, live: Tensor
) -> tuple[GateShares, tuple[GateShares, GateShares]]:
    r"""Return those of $S_t = \theta_t S_{t-1} - u_t k_t^\top$, $M_t = a_t M_{t-1} - S_t$; and of both in the end.

    At a token that is not `live` `[.., C]` the momentum does not move the memory.
    """
    log_decay = torch.zeros_like(log_momentum) if log_decay is None else log_decay
    (kept, memory), (pushed, since) = products(log_decay), products(log_momentum)
    kept = kept * live[..., None, :].to(kept.dtype)
    after = GateShares(kept @ pushed, memory, -(kept @ since[..., None])[..., 0])
    momentum = GateShares(-pushed[..., -1:, :], torch.zeros_like(since[..., -1:]), since[..., -1:])
    return after, (after.last(), momentum)


def added(k: Tensor, v: Tensor, end: GateShares, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Memories `[B, H, N, D_v, D_k]` that the chunks begin with, and the last, where v is written as it is."""
    kept = None if end.memory is None else _end(end.memory, k)
    shape, memory = memory.shape, memory.flatten(0, 1)
    begun = []
    for n, new in enumerate(matmul(v.mT, _written(k, end)).flatten(0, 1).unbind(1)):
        begun.append(memory)
        memory = memory + new if kept is None else torch.addcmul(new, kept[n], memory)
    return torch.stack(begun, dim=1).unflatten(0, shape[:2]), memory.unflatten(0, shape[:2])


def corrected(
    k: Tensor, v: Tensor, lr: Tensor, error: GateShares, ends: tuple[GateShares, ...], memory: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Writes that correct what a memory answers: $u_t = \eta_t\,(v_t - \tilde M_t k_t)$, with the shares `error` of M̃.

    With $L = \eta \odot \kappa \odot K K^\top$ below the diagonal,
    $U = (I + L)^{-1}\,\eta \odot (V - \gamma \odot K M_0^\top)$. The inverses are made for all chunks at once.

    Args:
        k, v: `[B, H, N, C, D]`.
        lr: η, `[B or 1, H or 1, N or 1, C]`.
        error: of M̃ at each token; a write of the token itself or of a later one is not taken.
        ends: of M after the chunk; with momentum, and of S.
        memory: M before the first chunk, `[B, H, D_v, D_k]`; with momentum, M and S side by side, `[B, H, D_v, 2 D_k]`.

    Returns:
        u `[B, H, N, C, D_v]`, the memories that the chunks begin with, and the last.
    """
    starts = None if error.memory is None else _together(error.memory, error.momentum)
    if ends[0].memory is None:
        return corrections(k, v, lr, error.writes, starts, None, None, memory)
    writes = torch.stack([end.writes[..., 0, :] for end in ends], dim=-1)
    turn = torch.stack(
        [_together(end.memory, end.momentum)[..., 0, :] for end in ends if end.memory is not None], dim=-2
    )
    return corrections(k, v, lr, error.writes, starts, writes, turn, memory)


def _together(memory: Tensor, momentum: Tensor | None) -> Tensor:
    """Return `[..]` and `[..]` as `[.., 2]`, or the first as `[.., 1]`."""
    return memory[..., None] if momentum is None else torch.stack([memory, momentum], dim=-1)


def answers(q: Tensor, k: Tensor, v: Tensor, read: GateShares, begun: Tensor) -> Tensor:
    """y `[B, H, N, X, D_v]` of memories that began as `begun`, and to which the pairs k, v were added."""
    pairs = matmul(q, k.mT) * read.writes
    start = matmul(_started(q, read), begun.mT)
    start, pairs, v = (x.flatten(0, 2) for x in (start, pairs, v))
    return plus_matmul(start, pairs, v).unflatten(0, q.shape[:3])


def _started(k: Tensor, at: GateShares) -> Tensor:
    """Keys times the shares of what the chunk began with: `[.., D_k]`, or `[.., 2 D_k]` with momentum."""
    if at.memory is None:
        return k
    parts = [k * share[..., None] for share in (at.memory, at.momentum) if share is not None]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


def _written(k: Tensor, end: GateShares) -> Tensor:
    """Keys times their shares of the chunk's end."""
    return k if end.memory is None else k * end.writes.mT


def _end(share: Tensor, like: Tensor) -> tuple[Tensor, ...]:
    """Return `[B or 1, H or 1, N or 1, 1]` as `[B H, 1, 1]` for each of the chunks of `like`."""
    return share.expand(*like.shape[:3], 1).flatten(0, 1)[..., None].unbind(1)
