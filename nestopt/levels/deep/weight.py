r"""A weight of a memory during a block of chunks: what the block found, and what has been written since, in rows.

With inputs a_t and directions g_t = η_t ∂ℓ/∂(output), both at the state that the token's chunk began with, and the
strengths e_t = δ η_t of the delta decay, the write is

$$S_t = \theta_t S_{t-1} + g_t a_t^\top, \qquad M_t = \alpha_t M_{t-1} - e_t (M_{t-1} a_t) a_t^\top - S_t,$$

and in closed form (`nestopt.kernels.products` has the coefficients), per token and without a copy of the
weight for it,

$$M_t = \gamma_t M_0 - c_t S_0 - \sum_{s\le t}(\Gamma_{ts} w_s + \kappa_{ts} g_s)\, a_s^\top, \qquad
  w_t = e_t M_{t-1} a_t,$$

where w solves one unit lower triangular system per chunk (NL eq. 83-91 in chunks). A new weight is made once a block:
where chunks are short, it would else be most of what is kept for the backward pass, being far larger than a chunk's
tokens. Within the block, a product with M_p is one with M_0, one with S_0, and two with rows.

M_0 and S_0 are used several times in a chunk. Each use hands them on, and the next takes them from there: so a gradient
passes from use to use, each of which adds to it in place, and no second one is made and added up. The last use is
`BlockWeight.end`, whose backward pass makes the gradient that the others write on: a weight that was handed on and is
kept by anybody else would have its gradient written on. Backward passes are torch operations, and can be differentiated
again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nestopt.core.precision import Product, plus_matmul_
from nestopt.kernels.functions import batched, may_write
from nestopt.kernels.products import GateProducts


class BlockWeight:
    """One weight `[.., out, in]` in a block of chunks, which are taken in turn.

    Args:
        weight, momentum: M_0 and S_0; no momentum where the recurrence has none.
        product: multiplies matrices (`nestopt.core.precision.product`).

    What has been written since: `inputs` a `[.., n, in]`, `steps` g and, with delta decay, `decays` w `[.., n, out]`.
    """

    def __init__(self, weight: Tensor, momentum: Tensor | None, product: Product) -> None:
        self.weight, self.momentum, self.product = weight, momentum, product
        self.inputs: Tensor | None = None
        self.steps: Tensor | None = None
        self.decays: Tensor | None = None
        self.done = 0  # tokens of the chunks before this one, of which `left` is left, and of the block's start γ and c
        self.gamma: Tensor | None = None
        self.c: Tensor | None = None
        self.left: Tensor | None = None
        self._applied: tuple[Any, ...] = ()

    # -- as a chunk finds it: M_p ------------------------------------------------------------------------------------

    def apply(self, x: Tensor, writes: int | None = None) -> Tensor:
        """M_p x: `[.., n, in]` to `[.., n, out]`. Of a chunk's last x the last `writes` rows, or all, are written."""
        base, self.weight = _Times.apply(self.weight, x, False, self.product)
        y, old = base if self.gamma is None else self.gamma * base, None
        if self.c is not None and self.momentum is not None:
            old, self.momentum = _Times.apply(self.momentum, x, False, self.product)
            y = y - self.c * old
        self._applied = x, base, old
        if writes is not None:
            self._applied = tuple(None if r is None else r[..., -writes:, :] for r in self._applied)
        if self.left is None or self.inputs is None:
            return y
        return y - self.product(self.product(x, self.inputs.mT), self.left)

    def pull(self, d: Tensor) -> Tensor:
        """M_pᵀ d: `[.., C, out]` to `[.., C, in]`."""
        y, self.weight = _Times.apply(self.weight, d, True, self.product)
        y = y if self.gamma is None else self.gamma * y
        if self.c is not None and self.momentum is not None:
            old, self.momentum = _Times.apply(self.momentum, d, True, self.product)
            y = y - self.c * old
        if self.left is None or self.inputs is None:
            return y
        return y - self.product(self.product(d, self.left.mT), self.inputs)

    def lengths(self) -> Tensor:
        """Squared lengths of the columns of M_p, `[.., in]`."""
        momentum = None if self.c is None else self.momentum
        inputs = None if self.left is None else self.inputs
        found, self.weight, *handed = _Squares.apply(
            self.weight, momentum, self.gamma, self.c, self.left, inputs, self.product
        )
        if handed:
            (self.momentum,) = handed
        return found

    # -- the chunk's write -------------------------------------------------------------------------------------------

    def write(self, steps: Tensor, strength: Tensor | None, near: Tensor | None, before: GateProducts | None) -> None:
        """Write the inputs a applied last, with g `[.., C, out]` and, for delta decay, its strength e `[.., C]`.

        The delta decay needs `near`, a aᵀ `[.., C, C]`, and the gates one token earlier (`GateProducts.before`).
        """
        self.steps, decays = _rows(self.steps, steps), None
        if strength is not None and near is not None and before is not None:
            answers, _, fading = self.unwritten(near, before)
            decays = strength[..., None] * solved(fading * strength[..., None, :], answers, self.product)
        self.inputs = _rows(self.inputs, self._applied[0])
        self.decays = self.decays if decays is None else _rows(self.decays, decays)

    def append(self, steps: Tensor, decays: Tensor | None) -> None:
        """Write the inputs applied last with g and, where there is a delta decay, w: `[.., C, out]` each."""
        self.steps = _rows(self.steps, steps)
        self.inputs = _rows(self.inputs, self._applied[0])
        self.decays = self.decays if decays is None else _rows(self.decays, decays)

    def meet(self, x: Tensor) -> None:
        """Let x `[.., C, in]` be what the chunk writes, in the place of what was applied last."""
        base, self.weight = _Times.apply(self.weight, x, False, self.product)
        self._applied = x, base, None

    def unwritten(self, near: Tensor, at: GateProducts) -> tuple[Tensor, Tensor, Tensor]:
        """Return what M_{t-1} x_t of the inputs applied last would be `[.., C, out]` if this chunk wrote but the steps
        that are there; and κ and Γ times x_t · x_s `[.., C, C]`: how much of g_s and w_s it will be less.

        `near` is x xᵀ `[.., C, C]`, `at` are the gates one token earlier (`GateProducts.before`).
        """
        x, base, old = self._applied
        answers = base if at.gamma is None else at.gamma[..., None] * base
        if self.momentum is not None and at.c is not None:
            if old is None:
                old, self.momentum = _Times.apply(self.momentum, x, False, self.product)
            answers = answers - at.c[..., None] * old
        if self.inputs is not None:
            near = torch.cat([self.product(x, self.inputs.mT), near], dim=-1)
        fading = _weigh(near, at)
        through = fading if at.kappa is None else at.kappa * near
        if self.steps is not None:
            answers = answers - self.product(_first(through, self.steps.shape[-2]), self.steps)
        if self.decays is not None:
            answers = answers - self.product(_first(fading, self.done), self.decays)
        return answers, _after(through, self.done), _after(fading, self.done)

    def read(self, x: Tensor, at: GateProducts) -> Tensor:
        """M_t x_t `[.., C, out]` for each token t of the chunk written last, whose gates come to `at`.

        With those of one token earlier (`GateProducts.before`) it is M_{t-1} x_t.
        """
        assert self.inputs is not None
        assert self.steps is not None
        y, self.weight = _Times.apply(self.weight, x, False, self.product)
        if at.gamma is not None:
            y = at.gamma[..., None] * y
        if self.momentum is not None and at.c is not None:
            old, self.momentum = _Times.apply(self.momentum, x, False, self.product)
            y = y - at.c[..., None] * old
        near = self.product(x, self.inputs.mT)
        if at.kappa is None:
            total = self.steps if self.decays is None else self.steps + self.decays
            return y - self.product(_weigh(near, at), total)
        y = y - self.product(at.kappa * near, self.steps)
        return y if self.decays is None else y - self.product(_weigh(near, at), self.decays)

    def close(self, last: GateProducts) -> None:
        """End the chunk: another of the block follows. `last` is what the gates come to at its last token."""
        assert self.inputs is not None
        self.done = self.inputs.shape[-2]
        self.gamma, self.c = (None if x is None else x[..., None] for x in (last.gamma, last.c))
        self.left = self._left(last)

    def end(self, last: GateProducts) -> tuple[Tensor, Tensor | None]:
        """M and S after the block, at whose last token the gates come to `last`."""
        gamma, c, theta = (None if x is None else x[..., None] for x in (last.gamma, last.c, last.theta))
        steps = None
        if last.Theta is not None and self.steps is not None:
            steps = last.Theta[..., -1, :, None] * self.steps
        momentum = None if steps is None else self.momentum
        ends = _Moved.apply(self.weight, momentum, self.inputs, gamma, self._left(last), c, theta, steps, self.product)
        return (ends, None) if isinstance(ends, Tensor) else ends

    def _left(self, last: GateProducts) -> Tensor:
        """Return `Γ ⊙ w + κ ⊙ g` `[.., n, out]`, with Γ and κ of the last token: what is left of each write then."""
        assert self.steps is not None
        Gamma, kappa = (None if x is None else x[..., -1, :, None] for x in (last.Gamma, last.kappa))
        if kappa is None:
            total = self.steps if self.decays is None else self.steps + self.decays
            return total if Gamma is None else Gamma * total
        if self.decays is None:
            return kappa * self.steps
        return kappa * self.steps + (self.decays if Gamma is None else Gamma * self.decays)


def _rows(old: Tensor | None, new: Tensor) -> Tensor:
    return new if old is None else torch.cat([old, new], dim=-2)


def _first(x: Tensor, count: int) -> Tensor:
    return x if count == x.shape[-1] else x[..., :count]


def _after(x: Tensor, count: int) -> Tensor:
    return x[..., count:] if count else x


def solved(system: Tensor, right: Tensor, product: Product) -> Tensor:
    """Solve (I + system) x = right `[.., C, n]`, of which `system` `[.., C, C]` is what is below the diagonal."""
    # by the inverse, which is as small as the system: a solver takes twice as long for so many columns
    eye = torch.eye(system.shape[-1], dtype=system.dtype, device=system.device).expand_as(system)
    inverse = torch.linalg.solve_triangular(system.mT, eye, upper=True, left=False, unitriangular=True)
    return product(inverse.mT, right)


def _weigh(near: Tensor, at: GateProducts) -> Tensor:
    """Return Γ ⊙ near; without Γ it is ones up to the diagonal."""
    return near.tril(at.diagonal) if at.Gamma is None else at.Gamma * near


# -- uses of a weight, which hand it on --------------------------------------------------------------------------------


class _Use(torch.autograd.Function):
    """Takes tensors, and the product last. Leading dimensions may be any."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.product = inputs[-1]
        ctx.save_for_backward(*inputs[:-1])
        ctx.set_materialize_grads(False)

    @classmethod
    def vmap(cls, info: Any, in_dims: Any, *args: Any) -> Any:
        return batched(cls, info, in_dims, args)


class _Times(_Use):
    """W x, from `[.., C, in]` to `[.., C, out]`, or, `transposed`, Wᵀ x, the other way; and W."""

    @staticmethod
    def forward(weight: Tensor, x: Tensor, transposed: bool, product: Product) -> tuple[Tensor, Tensor]:
        return product(x, weight if transposed else weight.mT), weight.view_as(weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        weight, x, ctx.transposed, ctx.product = inputs
        ctx.save_for_backward(weight, x)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        weight, x = ctx.saved_tensors
        if dy is None:
            return grad, None, None, None
        dx = ctx.product(dy, weight.mT if ctx.transposed else weight) if ctx.needs_input_grad[1] else None
        if ctx.needs_input_grad[0]:
            left, right = (x, dy) if ctx.transposed else (dy, x)
            grad = _plus_product(grad, left, right, ctx.product)
        return grad, dx, None, None


def _plus_product(grad: Tensor | None, left: Tensor, right: Tensor, product: Product) -> Tensor:
    """grad + leftᵀ right, in place where it may be."""
    if grad is None:
        return product(left.mT, right)
    if not may_write() or grad.ndim < 3 or not grad.is_contiguous():
        return grad + product(left.mT, right)
    one, two = (x.reshape(-1, *x.shape[-2:]) for x in (left.mT, right))
    plus_matmul_(grad.view(-1, *grad.shape[-2:]), one, two, product)
    return grad


class _Squares(_Use):
    """Squared lengths of the columns of γ W - c S - addedᵀ a, `[.., in]`; and W and S, if there is one.

    γ and c are `[.., 1, 1]`, `added` is `[.., n, out]` and a `[.., n, in]`; of W alone where they are None. The matrix
    is not kept, and made again in the backward pass.
    """

    @staticmethod
    def forward(
        weight: Tensor,
        momentum: Tensor | None,
        gamma: Tensor | None,
        c: Tensor | None,
        added: Tensor | None,
        inputs: Tensor | None,
        product: Product,
    ) -> tuple[Tensor, ...]:
        found = _since(weight, momentum, gamma, c, added, inputs, product).square().sum(-2)
        return (found, *(x.view_as(x) for x in (weight, momentum) if x is not None))

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, grad: Tensor | None, grad_s: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        weight, momentum, gamma, c, added, inputs = ctx.saved_tensors
        if dy is None:
            return grad, grad_s, None, None, None, None, None
        twice = (2 * dy)[..., None, :]
        if added is None:
            return _plus_scaled(grad, weight, twice), None, None, None, None, None, None
        d = _since(weight, momentum, gamma, c, added, inputs, ctx.product) * twice
        d_gamma = None if gamma is None else _inner(d, weight)
        d_c = None if momentum is None else -_inner(d, momentum)
        if momentum is not None:
            grad_s = _plus_scaled(grad_s, d, -c)
        d_added, d_inputs = -ctx.product(inputs, d.mT), -ctx.product(added, d)
        return _plus_scaled(grad, d, gamma), grad_s, d_gamma, d_c, d_added, d_inputs, None


class _Moved(_Use):
    """γ W - c S - addedᵀ a, and, with S, θ S + leftᵀ a: numbers are `[.., 1, 1]`; γ is 1 where it is None."""

    @staticmethod
    def forward(
        weight: Tensor,
        momentum: Tensor | None,
        inputs: Tensor,
        gamma: Tensor | None,
        added: Tensor,
        c: Tensor | None,
        theta: Tensor | None,
        left: Tensor | None,
        product: Product,
    ) -> Tensor | tuple[Tensor, Tensor]:
        new = _since(weight, momentum, gamma, c, added, inputs, product)
        if momentum is None or theta is None or left is None:
            return new
        return new, _plus_scaled(product(left.mT, inputs), momentum, theta)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, grad_s: Tensor | None = None) -> tuple[Tensor | None, ...]:
        weight, momentum, inputs, gamma, added, c, theta, left = ctx.saved_tensors
        needs, product = ctx.needs_input_grad, ctx.product
        found: list[Tensor | None] = [None] * 9
        if grad is not None:
            # in new tensors always: the uses before this one write on them
            found[0] = (grad.clone() if gamma is None else grad * gamma) if needs[0] else None
            found[1] = grad * -c if needs[1] and grad_s is None else None
            found[2] = -product(added, grad) if needs[2] else None
            found[3] = _inner(grad, weight) if needs[3] else None
            found[4] = -product(inputs, grad.mT) if needs[4] else None
            found[5] = -_inner(grad, momentum) if needs[5] else None
        if grad_s is not None:
            if needs[1]:
                found[1] = grad_s * theta if grad is None else _plus_scaled(grad_s * theta, grad, -c)
            if needs[2]:
                found[2] = product(left, grad_s) if found[2] is None else found[2] + product(left, grad_s)
            found[6] = _inner(grad_s, momentum) if needs[6] else None
            found[7] = product(inputs, grad_s.mT) if needs[7] else None
        return tuple(found)


def _since(
    weight: Tensor,
    momentum: Tensor | None,
    gamma: Tensor | None,
    c: Tensor | None,
    added: Tensor | None,
    inputs: Tensor | None,
    product: Product,
) -> Tensor:
    """γ W - c S - addedᵀ a."""
    if added is None or inputs is None:
        return weight
    new = _plus_scaled(product((-added).mT, inputs), weight, gamma)
    return new if momentum is None or c is None else _plus_scaled(new, momentum, -c)


def _plus_scaled(total: Tensor | None, x: Tensor, scale: Tensor | None) -> Tensor:
    """total + scale · x, on `total` where it may be."""
    if total is None:
        return x if scale is None else x * scale
    if not may_write():
        return total + (x if scale is None else x * scale)
    return total.add_(x) if scale is None else total.addcmul_(x, scale)


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """⟨a, b⟩ `[.., 1, 1]` over the last two dimensions, as rows times columns: without a temporary of their size."""
    one, two = (x.reshape(-1, 1, x.shape[-2] * x.shape[-1]) for x in (a, b))
    return torch.bmm(one, two.mT).view(*a.shape[:-2], 1, 1)
