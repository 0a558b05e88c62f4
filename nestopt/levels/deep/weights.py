"""What a chunk does with a weight of a memory, so that its backward pass goes over that weight's gradient in place.

A memory's weight is used several times in a chunk, and is far larger than the chunk's tokens. Each use here hands the
weight on, and the next use takes it from there: so its gradient passes from use to use, each of which adds to it, and
no second one is made and added up. All backward passes are torch operations, and can be differentiated again.

What is handed on is for the next use here only, and the last of them is `moved`: its backward pass makes the gradient
that the others write on. A weight that was handed on and is kept by anybody else would have its gradient written on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nestopt.core.precision import as_in_forward, current, matmul, plus_matmul_
from nestopt.kernels.functions import batched, may_write, plus, plus_product


def applied(weight: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """W x: `[.., out, in]` and `[.., C, in]` to `[.., C, out]`; and the weight, to be used from there on."""
    return _Applied.apply(weight, x)


def pulled(weight: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Wᵀ d: `[.., out, in]` and `[.., C, out]` to `[.., C, in]`; and the weight, to be used from there on."""
    return _Pulled.apply(weight, d)


def squares(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Squared lengths of the columns, `[.., out, in]` to `[.., in]`; and the weight, to be used from there on."""
    return _Squares.apply(weight)


def squares_since(
    weight: Tensor, momentum: Tensor | None, *, gamma: Tensor | None, c: Tensor | None, added: Tensor, inputs: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Squared lengths of the columns of γ W - c S - addedᵀ a, `[.., in]`; and W and S, to be used from there on.

    As for `moved`, but γ and c are `[.., 1, 1]`. The matrix itself is not kept, and made again in the backward pass.
    """
    if momentum is None:
        found, weight = _SquaresSince.apply(weight, None, gamma, None, added, inputs)
        return found, weight, None
    return _SquaresSince.apply(weight, momentum, gamma, c, added, inputs)


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

    W, S are `[.., out, in]`, γ, c, θ `[..]`, a `[.., C, in]` and the rest `[.., C, out]`. Without γ it is 1; without S
    there are no c, θ and `left`.
    """
    if momentum is None:
        return _Moved.apply(weight, inputs, gamma, added), None
    return _MovedBoth.apply(weight, momentum, inputs, gamma, added, c, theta, left)


def _plus_product(grad: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """grad + leftᵀ right, in place where it may be."""
    if grad is None:
        return matmul(left.mT, right)
    if not may_write() or grad.ndim < 3 or not grad.is_contiguous():
        return grad + matmul(left.mT, right)
    one, two = (x.reshape(-1, *x.shape[-2:]) for x in (left.mT, right))
    plus_matmul_(grad.view(-1, *grad.shape[-2:]), one, two)
    return grad


class _Applied(torch.autograd.Function):
    @staticmethod
    def forward(weight: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return matmul(x, weight.mT), weight.view_as(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs)
        ctx.precision = current()
        ctx.set_materialize_grads(False)

    @staticmethod
    @as_in_forward
    def backward(ctx: Any, dy: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        weight, x = ctx.saved_tensors
        if dy is None:
            return grad, None
        dx = matmul(dy, weight) if ctx.needs_input_grad[1] else None
        return _plus_product(grad, dy, x) if ctx.needs_input_grad[0] else None, dx

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return batched(_Applied, info, in_dims, args)


class _Pulled(torch.autograd.Function):
    @staticmethod
    def forward(weight: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
        return matmul(d, weight), weight.view_as(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs)
        ctx.precision = current()
        ctx.set_materialize_grads(False)

    @staticmethod
    @as_in_forward
    def backward(ctx: Any, dy: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        weight, d = ctx.saved_tensors
        if dy is None:
            return grad, None
        dd = matmul(dy, weight.mT) if ctx.needs_input_grad[1] else None
        return _plus_product(grad, d, dy) if ctx.needs_input_grad[0] else None, dd

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return batched(_Pulled, info, in_dims, args)


class _Squares(torch.autograd.Function):
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
        return grad.addcmul_(weight, twice) if may_write() else grad + twice * weight

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return batched(_Squares, info, in_dims, args)


class _SquaresSince(torch.autograd.Function):
    @staticmethod
    def forward(
        weight: Tensor,
        momentum: Tensor | None,
        gamma: Tensor | None,
        c: Tensor | None,
        added: Tensor,
        inputs: Tensor,
    ) -> tuple[Tensor, ...]:
        found = _since(weight, momentum, gamma, c, added, inputs).square().sum(-2)
        if momentum is None:
            return found, weight.view_as(weight)
        return found, weight.view_as(weight), momentum.view_as(momentum)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs)
        ctx.precision = current()
        ctx.set_materialize_grads(False)

    @staticmethod
    @as_in_forward
    def backward(
        ctx: Any, dy: Tensor | None, grad: Tensor | None, grad_s: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        weight, momentum, gamma, c, added, inputs = ctx.saved_tensors
        if dy is None:
            return grad, grad_s, None, None, None, None
        d = _since(weight, momentum, gamma, c, added, inputs) * (2 * dy)[..., None, :]
        d_gamma = None if gamma is None else _inner(d, weight)[..., None, None]
        d_c = None if momentum is None else -_inner(d, momentum)[..., None, None]
        if momentum is not None:
            grad_s = _plus_scaled(grad_s, d, -c)
        return _plus_scaled(grad, d, gamma), grad_s, d_gamma, d_c, -matmul(inputs, d.mT), -matmul(added, d)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return batched(_SquaresSince, info, in_dims, args)


def _since(
    weight: Tensor, momentum: Tensor | None, gamma: Tensor | None, c: Tensor | None, added: Tensor, inputs: Tensor
) -> Tensor:
    """γ W - c S - addedᵀ a."""
    new = matmul((-added).mT, inputs)
    add_product = Tensor.addcmul_ if may_write() else torch.addcmul  # in place there is no batching rule
    new = new.add_(weight) if gamma is None else add_product(new, weight, gamma)
    return new if momentum is None or c is None else add_product(new, momentum, -c)


def _plus_scaled(grad: Tensor | None, d: Tensor, scale: Tensor | None) -> Tensor:
    """grad + scale · d, in place where it may be."""
    if grad is None:
        return d if scale is None else d * scale
    if not may_write():
        return grad + (d if scale is None else d * scale)
    return grad.add_(d) if scale is None else grad.addcmul_(d, scale)


class _Moved(torch.autograd.Function):
    @staticmethod
    def forward(weight: Tensor, inputs: Tensor, gamma: Tensor | None, added: Tensor) -> Tensor:
        new = matmul((-added).mT, inputs)
        return plus(new, weight) if gamma is None else plus_product(new, weight, _wide(gamma))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.precision = current()

    @staticmethod
    @as_in_forward
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, inputs, gamma, added = ctx.saved_tensors
        needs = ctx.needs_input_grad
        d_weight = _faded(grad, gamma) if needs[0] else None
        d_inputs = -matmul(added, grad) if needs[1] else None
        d_gamma = _inner(grad, weight) if needs[2] else None
        return d_weight, d_inputs, d_gamma, -matmul(inputs, grad.mT) if needs[3] else None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return batched(_Moved, info, in_dims, args)


class _MovedBoth(torch.autograd.Function):
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
        new = matmul((-added).mT, inputs)
        new = plus(new, weight) if gamma is None else plus_product(new, weight, _wide(gamma))
        new = plus_product(new, momentum, _wide(-c))
        return new, plus_product(matmul(left.mT, inputs), momentum, _wide(theta))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs)
        ctx.precision = current()
        ctx.set_materialize_grads(False)

    @staticmethod
    @as_in_forward
    def backward(ctx: Any, grad: Tensor | None, grad_s: Tensor | None) -> tuple[Tensor | None, ...]:
        weight, momentum, inputs, gamma, added, c, theta, left = ctx.saved_tensors
        needs = ctx.needs_input_grad
        found: list[Tensor | None] = [None] * 8
        if grad is not None:
            found[0] = _faded(grad, gamma) if needs[0] else None
            found[1] = grad * _wide(-c) if needs[1] and grad_s is None else None
            found[2] = -matmul(added, grad) if needs[2] else None
            found[3] = _inner(grad, weight) if needs[3] else None
            found[4] = -matmul(inputs, grad.mT) if needs[4] else None
            found[5] = -_inner(grad, momentum) if needs[5] else None
        if grad_s is not None:
            found[1] = _carried(grad_s, theta, grad, c) if needs[1] else None
            if needs[2]:
                found[2] = matmul(left, grad_s) if found[2] is None else found[2] + matmul(left, grad_s)
            found[6] = _inner(grad_s, momentum) if needs[6] else None
            found[7] = matmul(inputs, grad_s.mT) if needs[7] else None
        return tuple(found)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
        return batched(_MovedBoth, info, in_dims, args)


def _faded(grad: Tensor, gamma: Tensor | None) -> Tensor:
    """γ grad, in a new tensor always: the uses before this one write on it."""
    return grad.clone() if gamma is None else grad * _wide(gamma)


def _carried(grad_s: Tensor, theta: Tensor, grad: Tensor | None, c: Tensor) -> Tensor:
    """θ grad_s - c grad, in a new tensor likewise."""
    found = grad_s * _wide(theta)
    if grad is None:
        return found
    return found.addcmul_(grad, _wide(-c)) if may_write() else found - grad * _wide(c)


def _wide(number: Tensor) -> Tensor:
    return number[..., None, None]


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """⟨a, b⟩ over the last two dimensions, as rows times columns: without a temporary of their size."""
    one, two = (x.reshape(-1, 1, x.shape[-2] * x.shape[-1]) for x in (a, b))
    return torch.bmm(one, two.mT).view(a.shape[:-2])
