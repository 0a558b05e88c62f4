r"""Vectors brought to one length, and the backward pass in as few passes over them.

Of $y = r x$ with r a number for each vector, $\dot x = r\,\dot y - r^3\,(x\cdot\dot y)\,x$ times what the norm in r is
divided by. Autograd makes a dozen tensors of the size of x for that; here there are two.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nestopt.kernels.functions import batched, may_write


def unit(x: Tensor, eps: float | None = None, least: float = 1e-12) -> Tensor:
    """x `[.., D]` over its length, as `torch.nn.functional.normalize` on the last dimension; with `eps` over its root
    mean square, as `torch.nn.functional.rms_norm` without a weight.

    Vectors shorter than `least` are divided by that; in float16, which has no such number, those shorter than 2^-10.
    """
    if x.dtype == torch.float16:  # which has no room for squares, nor for what a short vector is multiplied with
        return unit(x.float(), eps, 2.0**-10).half()
    # without a graph, as for a token alone, the function by itself: to apply it takes as long again
    return _Unit.apply(x, eps, least) if torch.is_grad_enabled() else x * _inverse(x, eps, least)


def _inverse(x: Tensor, eps: float | None, least: float) -> Tensor:
    """r `[.., 1]`, of vectors no shorter than `least`."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    if eps is None:
        return length.clamp_min(least).reciprocal()
    return (length.square() / x.shape[-1] + eps).rsqrt()


class _Unit(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, eps: float | None, least: float) -> Tensor:
        return x * _inverse(x, eps, least)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float | None, float], output: Tensor) -> None:
        x, ctx.eps, ctx.least = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        r = _inverse(x, ctx.eps, ctx.least)
        along = (x * dy).sum(-1, keepdim=True) * r**3
        along = torch.where(r * ctx.least < 1, along, 0) if ctx.eps is None else along / x.shape[-1]
        if may_write():
            return (dy * r).addcmul_(x, along, value=-1), None, None
        return dy * r - x * along, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return batched(_Unit, info, in_dims, args)
