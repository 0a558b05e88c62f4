r"""Matrix memories whose decay is one for each channel of the keys, exact and parallel within chunks of tokens.

$$M_t = M_{t-1}\,\mathrm{Diag}(\alpha_t) + \sum_i u_{i,t} k_{i,t}^\top, \qquad
  M_t = M_0\,\mathrm{Diag}(\gamma_t) + \sum_{s\le t}\sum_i u_{i,s}\,(\Gamma_{ts}\odot k_{i,s})^\top$$

with $\Gamma_{ts} = \prod_{s<r\le t}\alpha_r$ by channel, so that a read takes $\sum_d q_{td}\Gamma_{tsd}k_{sd}$ of each
pair of tokens. A chunk is halved again and again: of a pair that a middle parts, Γ is the product up to the middle
times that from it on, each within the half, and all pairs of a half with the other are one product of matrices. So
nothing is divided, there are no logarithms, and decays of 0 are exact, with their gradients. (GLA, Yang et al. 2023,
section 4, has two such steps; here are as many as there are.)
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nestopt.core.precision import Product, matmul, product
from nestopt.kernels.products import shifted
from nestopt.levels.matrix.segments import chunks_of


@dataclasses.dataclass(frozen=True)
class ChannelDecays:
    """Products of decays `[.., C, D]` within chunks, C a power of two.

    Attributes:
        since: γ, of all up to each token, itself too: what is left of the chunk's start.
        until: of all after each token: what is left of its write at the chunk's end.
        halves: for halves of 1, 2, 4, .. tokens, the products from the middle up to each token of the later half,
            `[.., n, h, D]`, and those after each token of the earlier one up to the middle.
    """

    since: Tensor
    until: Tensor
    halves: tuple[tuple[Tensor, Tensor], ...]

    @staticmethod
    def of(decay: Tensor) -> ChannelDecays:
        size = decay.shape[-2]
        since, until = decay[..., None, :], torch.ones_like(decay)[..., None, :]
        halves = []
        while since.shape[-2] < size:
            (first, later), (before, last) = (x.unflatten(-3, (-1, 2)).unbind(-3) for x in (since, until))
            halves.append((later, before))
            since = torch.cat([first, later * first[..., -1:, :]], dim=-2)
            until = torch.cat([before * later[..., -1:, :], last], dim=-2)
        return ChannelDecays(since[..., 0, :, :], until[..., 0, :, :], tuple(halves))

    def end(self) -> Tensor:
        """Return what is left of the chunk's start at its end, `[.., D]`."""
        return self.since[..., -1, :]

    def start(self, *, before: bool) -> Tensor:
        """Return what is left of the chunk's start at each token, or before it, `[.., C, D]`."""
        return shifted(self.since, 1.0) if before else self.since

    def pairs(self, x: Tensor, y: Tensor, *, before: bool) -> Tensor:
        r"""Return $\sum_d x_{td}\Gamma_{tsd}y_{sd}$ for s < t, else 0: `[.., C, C]`. `before`: Γ up to t - 1."""
        found = x.new_zeros(*x.shape[:-1], 1, 1)
        for later, earlier in self.halves:
            size = later.shape[-2]
            left = x.unflatten(-2, (-1, 2, size))[..., 1, :, :] * (shifted(later, 1.0) if before else later)
            right = y.unflatten(-2, (-1, 2, size))[..., 0, :, :] * earlier
            across = (left * right).sum(-1)[..., None] if size == 1 else matmul(left, right.mT)
            first, last = found.unflatten(-3, (-1, 2)).unbind(-3)
            rows = torch.cat([across, last], dim=-1)
            found = torch.cat([F.pad(first, (0, size)), rows], dim=-2)
        return found[..., 0, :, :]


@dataclasses.dataclass(frozen=True)
class Correction:
    r"""Writes $u_t = \eta_t (v_t - \tilde M_t p_t)$ along k.

    Attributes:
        ask: p `[.., C, D_k]`, at which the memory is asked.
        along: k, times η.
        values: v `[.., C, D_v]`; None is 0.
        before: whether $\tilde M_t$ is $M_{t-1}$; else that after its decay.
    """

    ask: Tensor
    along: Tensor
    values: Tensor | None
    before: bool


def channel_scan(
    q: Tensor,
    decay: Tensor,
    memory: Tensor,
    size: int,
    *,
    plain: tuple[Tensor, Tensor] | None = None,
    correction: Correction | None = None,
    before: bool,
) -> tuple[Tensor, Tensor]:
    """Run over whole chunks of `size` tokens, from M `[B, H, D_v, D_k]`: y `[B, H, T, D_v]` and M after them.

    Args:
        q: `[B, H, T, D_k]`.
        decay: α, likewise; 1 where no token is active.
        memory: M.
        size: of a chunk.
        plain: keys and values of writes as they are, 0 where no token is active.
        correction: writes of errors, likewise; these see the plain ones of the tokens before.
        before: whether a token reads the memory before its own writes and decay.
    """
    q = _whole(q, size)
    decays = ChannelDecays.of(_whole(decay, size, 1.0))
    known, keys, asked = None, [], None
    if plain is not None:
        known = _whole(plain[0], size), _whole(plain[1], size)
        keys.append(known[0])
    if correction is not None:
        ask, along = (_whole(x, size) for x in (correction.ask, correction.along))
        wanted = None if correction.values is None else _whole(correction.values, size)
        if known is not None:
            seen = matmul(decays.pairs(ask, known[0], before=correction.before), known[1])
            wanted = -seen if wanted is None else wanted - seen
        assert wanted is not None
        lower = decays.pairs(ask, along, before=correction.before)
        both = torch.cat([wanted, ask * decays.start(before=correction.before)], dim=-1)
        asked = _Solved.apply(lower, both, product()).split([wanted.shape[-1], ask.shape[-1]], -1)
        keys.append(along)
    begun, errors, memory = _through(known, keys[-1], asked, decays, memory)
    y = matmul(q * decays.start(before=before), begun.mT)
    written = [] if known is None else [known[1]]
    for key, value in zip(keys, written if errors is None else [*written, errors], strict=True):
        shares = decays.pairs(q, key, before=before)
        if not before:
            shares = shares + torch.diag_embed((q * key).sum(-1))
        y = y + matmul(shares, value)
    return y[..., :size, :].flatten(2, 3), memory


def _through(
    known: tuple[Tensor, Tensor] | None,
    along: Tensor,
    asked: tuple[Tensor, Tensor] | None,
    decays: ChannelDecays,
    memory: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Memories `[B, H, N, D_v, D_k]` that the chunks begin with, what is written of errors, and the last memory."""
    until, kept = decays.until, decays.end()[..., None, :].unbind(2)
    added = None if known is None else matmul(known[1].mT, known[0] * until).unbind(2)
    parts = None if asked is None else [x.unbind(2) for x in (*asked, along * until)]
    begun, errors = [], []
    for n, keep in enumerate(kept):
        begun.append(memory)
        new = memory * keep if added is None else torch.addcmul(added[n], memory, keep)
        if parts is not None:
            value, ask, key = (part[n] for part in parts)
            errors.append(value - matmul(ask, memory.mT))
            new = new + matmul(errors[-1].mT, key)
        memory = new
    return torch.stack(begun, dim=2), torch.stack(errors, dim=2) if errors else None, memory


class _Solved(torch.autograd.Function):
    """(I + L)^-1 x, of which L is below the diagonal; the products of its backward pass are those of here and now."""

    generate_vmap_rule = True

    @staticmethod
    def forward(lower: Tensor, x: Tensor, multiply: Product) -> Tensor:
        return torch.linalg.solve_triangular(lower, x, upper=False, unitriangular=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)
        ctx.multiply = inputs[2]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        lower, y = ctx.saved_tensors
        to_x = torch.linalg.solve_triangular(lower.mT, grad, upper=True, unitriangular=True)
        return -ctx.multiply(to_x, y.mT).tril(-1), to_x, None


def _whole(x: Tensor, size: int, value: float = 0.0) -> Tensor:
    """Return `[B, H, T, D]` as `[B, H, N, C, D]`, with `value` at the end of chunks that C, a power of two, makes."""
    more = (1 << (size - 1).bit_length()) - size
    chunks = chunks_of(x, size)
    return F.pad(chunks, (0, 0, 0, more), value=value) if more else chunks
