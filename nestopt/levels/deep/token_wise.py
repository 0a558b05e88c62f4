r"""A matrix memory of values of its own, written token by token: what chunks of one token come to, in few operations.

With a key of length |k| and $h_t = \eta_t k_t$, of tokens one after the other

$$\hat v_t = s_t (v_t + W_{t-1} v_t), \qquad e_t = k_t + (1+\delta) W_{t-1} k_t - \hat v_t, \qquad
  W_t = \alpha_t W_{t-1} - e_t h_t^\top$$

where $s_t \le 1$ cuts a value to the length of $v_t$. No product of chunks makes this less than a loop, since what is
written is read. So the loop has only what must be in it, and its backward pass is written down: it needs the weights
that a block of tokens began with, and what was read of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nestopt.core.objectives import L2
from nestopt.core.precision import current
from nestopt.kernels.functions import may_write
from nestopt.levels.deep.mlp import Settings
from nestopt.levels.deep.step_size import EPS, LEAST, bounded

BLOCK = 64
"""Tokens between weights that are kept for the backward pass, which makes those between them again."""


def takes(weights: list[Tensor], momenta: list[Tensor] | None, settings: Settings) -> bool:
    """Return whether a memory is one of this kind, and nothing but torch's own autograd looks on."""
    mine = settings.own_values and settings.chunk == 1 and settings.step != "layerwise"
    mine = mine and type(settings.objective) is L2 and settings.form.residual and not settings.form.norm
    plain = current() == "float32" and not torch.compiler.is_compiling()
    return mine and plain and len(weights) == 1 and momenta is None and not torch._C._are_functorch_transforms_active()


def scan(weight: Tensor, q: Tensor, fresh: Mapping[str, Tensor], settings: Settings) -> tuple[Tensor, Tensor]:
    """Return y `[B, H, T, D]` of queries q, and the weight `[B, H, D, D]` after the tokens, for `scan_chunks`."""
    k, v, lr, keep = (fresh[name] for name in ("k", "v", "lr", "decay"))
    if settings.step == "normalized":
        lr = settings.bound * lr * keep / (EPS + (1 + settings.delta) * k.square().sum(-1))
    rows = [_by_token(x) for x in (v, k, q, lr[..., None] * k, keep[..., None])]
    now, found = weight.flatten(0, 1), []
    for block in zip(*(x.split(BLOCK) for x in rows), strict=True):
        read, now = _Block.apply(now, *block, settings.delta, settings.step == "normalized")
        found.append(read)
    read = torch.cat(found) if len(found) > 1 else found[0]
    return q + read.unflatten(1, q.shape[:2]).movedim(0, 2), now.unflatten(0, q.shape[:2])


def _by_token(x: Tensor) -> Tensor:
    """`[B, H, T, D]` as `[T, B · H, D]`."""
    return x.flatten(0, 1).transpose(0, 1).contiguous()


def _plain(given: Sequence[Tensor], delta: float, cuts: bool) -> tuple[Tensor, Tensor]:
    """Return what `_Block` computes, by operations that can be differentiated again and again."""
    weight, *tokens = given
    reads = []
    for v_t, k_t, q_t, h_t, keep_t in zip(*tokens, strict=True):
        own, of_key, read = (torch.stack([v_t, k_t, q_t], 1) @ weight.mT).unbind(1)
        own = bounded(v_t + own, v_t) if cuts else v_t + own
        error = k_t + (1 + delta) * of_key - own
        weight = keep_t[..., None] * weight - error[..., :, None] * h_t[..., None, :]
        reads.append(read)
    return torch.stack(reads), weight


class _Block(torch.autograd.Function):
    """A block of tokens: W `[N, D, D]`; v, k, q, h `[T, N, D]`; α `[T, N, 1]`; δ; and whether values are cut."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, v: Tensor, k: Tensor, q: Tensor, h: Tensor, keep: Tensor, delta: float, cuts: bool
    ) -> tuple[Tensor, Tensor]:
        asked, most = torch.stack([v, k, q], dim=2), _most(v, cuts)
        reads, now = torch.empty_like(asked), weight.clone()
        for t in range(len(v)):
            torch.bmm(asked[t], now.mT, out=reads[t])
            own, error = v[t] + reads[t, :, 0], torch.add(k[t], reads[t, :, 1], alpha=1 + delta)
            cut = torch.linalg.vecdot(own, own)[:, None].add_(LEAST).reciprocal_().mul_(most[t]).clamp_max_(1.0).sqrt_()
            error.addcmul_(own, cut, value=-1)
            now.mul_(keep[t][..., None]).addcmul_(error[..., None], h[t][:, None], value=-1)
        ctx.save_for_backward(weight, v, k, q, h, keep, reads[:, :, :2])
        ctx.delta, ctx.cuts = delta, cuts
        return reads[:, :, 2], now

    @staticmethod
    def backward(ctx: Any, to_reads: Tensor, to_weight: Tensor) -> tuple[Tensor | None, ...]:
        *given, reads = ctx.saved_tensors
        if not may_write():
            return (*_again(given, ctx, (to_reads, to_weight)), None, None)
        weight, v, k, q, h, keep = given
        asked, count, most = torch.stack([v, k, q], dim=2), len(v), _most(v, ctx.cuts)
        own = v + reads[:, :, 0]
        length = own.square().sum(-1, keepdim=True) + LEAST
        share = most / length
        cut = share.clamp_max(1.0).sqrt()
        error = torch.add(k, reads[:, :, 1], alpha=1 + ctx.delta).addcmul_(own, cut, value=-1)
        pulled = own * torch.where(share <= 1, cut / length, 0)
        before = weight.new_empty(count, *weight.shape)  # W as each token found it
        before[0] = weight
        for t in range(count - 1):
            torch.mul(before[t], keep[t][..., None], out=before[t + 1])
            before[t + 1].addcmul_(error[t][..., None], h[t][:, None], value=-1)
        after, to_rows = torch.empty_like(before), torch.empty_like(asked)  # the gradients of W after it, and of reads
        to_rows[:, :, 2] = to_reads
        to_error = torch.empty_like(error)
        now = to_weight.clone()
        for t in range(count - 1, -1, -1):
            after[t] = now
            of_error = torch.bmm(h[t][:, None], now.mT, out=to_error[t][:, None])[:, 0]  # times -1
            of_own = torch.mul(of_error, cut[t], out=to_rows[t, :, 0])
            of_own.addcmul_(pulled[t], torch.linalg.vecdot(own[t], of_error)[:, None], value=-1)
            torch.mul(of_error, -1 - ctx.delta, out=to_rows[t, :, 1])
            now.mul_(keep[t][..., None]).baddbmm_(to_rows[t].mT, asked[t])
        to_asked = to_rows @ before
        to_v, to_k, to_q = to_asked.unbind(2)
        to_cut = (own * to_error).sum(-1, keepdim=True)
        to_most = torch.where(share <= 1, to_cut * cut / most, 0)  # twice
        to_h = -(error[..., None, :] @ after)[..., 0, :]
        to_keep = (after * before).sum((-1, -2))[..., None]
        to_v = (to_v + to_rows[:, :, 0]).addcmul_(v, to_most)
        return now, to_v, to_k - to_error, to_q, to_h, to_keep, None, None


def _most(v: Tensor, cuts: bool) -> Tensor:
    """Return the squared length that a value may have, `[T, N, 1]`."""
    return v.square().sum(-1, keepdim=True) + LEAST if cuts else v.new_full((*v.shape[:-1], 1), math.inf)


def _again(given: list[Tensor], ctx: Any, to_outputs: tuple[Tensor, Tensor]) -> list[Tensor | None]:
    """Return the gradients of all given, which can be differentiated."""
    with torch.enable_grad():
        inputs = [x.view_as(x) for x in given]  # some are made of others
        wanted = [x for x, need in zip(inputs, ctx.needs_input_grad, strict=False) if need]
        outputs = _plain(inputs, ctx.delta, ctx.cuts)
        found = iter(torch.autograd.grad(outputs, wanted, to_outputs, create_graph=True))
    return [next(found) if need else None for _, need in zip(inputs, ctx.needs_input_grad, strict=False)]
