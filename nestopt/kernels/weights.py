"""What a chunk does with a weight of a memory, so that its backward pass goes over that weight's gradient in place.

A memory's weight is used several times in a chunk, and is far larger than the chunk's tokens. Each use here hands the
weight on, and the next use takes it from there: so its gradient passes from use to use, each of which adds to it, and no
second one is made and added up. All backward passes are torch operations, and can be differentiated again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def applied(weight: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """W x: `[.., out, in]` and `[.., C, in]` to `[.., C, out]`; and the weight, to be used from there on."""
    return _Applied.apply(weight, x)  # type: ignore[no-any-return]


def pulled(weight: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Wᵀ d: `[.., out, in]` and `[.., C, out]` to `[.., C, in]`; and the weight, to be used from there on."""
    return _Pulled.apply(weight, d)  # type: ignore[no-any-return]


def squares(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Squared lengths of the columns, `[.., out, in]` to `[.., in]`; and the weight, to be used from there on."""
    return _Squares.apply(weight)  # type: ignore[no-any-return]


def moved(
    weight: Tensor,
    momentum: Tensor | None,
    inputs: Tensor,
    *,
    gamma: Tensor | None,
    added: Tensor,
    c: Tensor | None,
    theta: Tensor | None,
    left: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """γ W - c S - addedᵀ a, and θ S + leftᵀ a.

    W, S are `[.., out, in]`, γ, c, θ `[..]`, a `[.., C, in]` and the rest `[.., C, out]`. Without γ it is 1; without S there are no
    c, θ and `left`.
    """
    if momentum is None:
        return _Moved.apply(weight, inputs, gamma, added), None
    return _MovedBoth.apply(weight, momentum, inputs, gamma, added, c, theta, left)  # type: ignore[no-any-return]


def _plus_product(grad: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """grad + leftᵀ right, in place where nobody will differentiate this."""
    if grad is None:
        return left.mT @ right
    if torch.is_grad_enabled() or grad.ndim < 3 or not grad.is_contiguous():
        return grad + left.mT @ right
    shape = grad.shape
    grad.view(-1, *shape[-2:]).baddbmm_(left.mT.reshape(-1, shape[-2], left.shape[-2]), right.reshape(-1, *right.shape[-2:]))
    return grad


class _Applied(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return x @ weight.mT, weight.view_as(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        weight, x = ctx.saved_tensors
        if dy is None:
            return grad, None
        dx = dy @ weight if ctx.needs_input_grad[1] else None
        return _plus_product(grad, dy, x) if ctx.needs_input_grad[0] else None, dx


class _Pulled(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        return d @ weight, weight.view_as(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        weight, d = ctx.saved_tensors
        if dy is None:
            return grad, None
        dd = dy @ weight.mT if ctx.needs_input_grad[1] else None
        return _plus_product(grad, d, dy) if ctx.needs_input_grad[0] else None, dd


class _Squares(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor) -> tuple[Tensor, Tensor]:
        return weight.square().sum(-2), weight.view_as(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, grad: Tensor | None) -> Tensor | None:
        (weight,) = ctx.saved_tensors
        if dy is None:
            return grad
        twice = (2 * dy)[..., None, :]
        if grad is None:
            return twice * weight
        return grad + twice * weight if torch.is_grad_enabled() else grad.addcmul_(weight, twice)


class _Moved(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, inputs: Tensor, gamma: Tensor | None, added: Tensor) -> Tensor:
        new = (-added).mT @ inputs
        return new.add_(weight) if gamma is None else new.addcmul_(weight, _wide(gamma))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, inputs, gamma, added = ctx.saved_tensors
        # a new tensor always: those who come after write on it
        d_weight = (grad.clone() if gamma is None else grad * _wide(gamma)) if ctx.needs_input_grad[0] else None
        d_gamma = _inner(grad, weight) if ctx.needs_input_grad[2] else None
        return d_weight, -(added @ grad), d_gamma, -(inputs @ grad.mT)


class _MovedBoth(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        weight: Tensor,
        momentum: Tensor,
        inputs: Tensor,
        gamma: Tensor | None,
        added: Tensor,
        c: Tensor,
        theta: Tensor,
        left: Tensor,
    ) -> tuple[Tensor, Tensor]:
        new = (-added).mT @ inputs
        new = new.add_(weight) if gamma is None else new.addcmul_(weight, _wide(gamma))
        new.addcmul_(momentum, _wide(-c))
        return new, (left.mT @ inputs).addcmul_(momentum, _wide(theta))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_s: Tensor) -> tuple[Tensor | None, ...]:
        weight, momentum, inputs, gamma, added, c, theta, left = ctx.saved_tensors
        needs = ctx.needs_input_grad
        d_weight = (grad.clone() if gamma is None else grad * _wide(gamma)) if needs[0] else None
        d_gamma = _inner(grad, weight) if needs[3] else None
        d_momentum = grad_s * _wide(theta) if needs[1] else None
        if d_momentum is not None:
            less = torch.is_grad_enabled()
            d_momentum = d_momentum - grad * _wide(c) if less else d_momentum.addcmul_(grad, _wide(-c))
        d_c = -_inner(grad, momentum) if needs[5] else None
        d_theta = _inner(grad_s, momentum) if needs[6] else None
        d_inputs = left @ grad_s - added @ grad if needs[2] else None
        return d_weight, d_momentum, d_inputs, d_gamma, -(inputs @ grad.mT), d_c, d_theta, inputs @ grad_s.mT


def _wide(number: Tensor) -> Tensor:
    return number[..., None, None]


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """⟨a, b⟩ over the last two dimensions."""
    return (a * b).sum((-2, -1))
