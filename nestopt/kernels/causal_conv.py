"""A depthwise causal convolution with a residual, in one pass over its tokens for each that it sees.

torch's own convolutions take two to four times as long here, where a channel has few weights.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nestopt.kernels.functions import batched, may_write


def causal_conv(seen: Tensor, weight: Tensor) -> Tensor:
    r"""Return $y_t = x_t + \sum_i w_i \odot x_{t-i}$: weights `[.., width, D]`, the oldest token's first, of tokens
    `[.., B, width - 1 + T, D]` to `[.., B, T, D]`.
    """
    return _CausalConv.apply(seen, weight)


def _each(weight: Tensor) -> list[Tensor]:
    """Return `[.., width, D]` as so many of `[.., 1, 1, D]`."""
    return list(weight[..., None, None, :].movedim(-4, 0).unbind(0))


class _CausalConv(torch.autograd.Function):
    @staticmethod
    def forward(seen: Tensor, weight: Tensor) -> Tensor:
        *past, now = _each(weight)
        length = seen.shape[-2] - len(past)
        last = seen[..., len(past) :, :]
        y = torch.addcmul(last, last, now)
        for i, w in enumerate(past):
            # not on y where a compiler traces it: it saves that memory by itself, and that of torch 2.11 gives an
            # autograd function no gradients if its output was written on
            add = torch.addcmul if torch.compiler.is_compiling() else Tensor.addcmul_
            y = add(y, seen[..., i : i + length, :], w)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        seen, weight = ctx.saved_tensors
        to_seen = to_weight = None
        if ctx.needs_input_grad[0]:
            to_seen = _to_seen(dy, weight)
        if ctx.needs_input_grad[1]:
            length = dy.shape[-2]
            windows = (seen[..., i : i + length, :] for i in range(weight.shape[-2]))
            to_weight = torch.stack([(dy * x).sum((-3, -2)) for x in windows], dim=-2)
        return to_seen, to_weight

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return batched(_CausalConv, info, in_dims, args)


def _to_seen(dy: Tensor, weight: Tensor) -> Tensor:
    *past, now = _each(weight)
    if not may_write():
        total = F.pad(dy + dy * now, (0, 0, len(past), 0))
        for i, w in enumerate(past):
            total = total + F.pad(dy * w, (0, 0, i, len(past) - i))
        return total
    length = dy.shape[-2]
    total = dy.new_empty(*dy.shape[:-2], length + len(past), dy.shape[-1])
    total[..., : len(past), :] = 0
    torch.addcmul(dy, dy, now, out=total[..., len(past) :, :])
    for i, w in enumerate(past):
        total[..., i : i + length, :].addcmul_(dy, w)
    return total
