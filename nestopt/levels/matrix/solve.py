"""Systems of symmetric positive matrices: by conjugate gradients of so many steps, or by a factor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Apply = Callable[..., Tensor]
"""Takes vectors p `[.., D]` and the matrices' parameters, and returns A p; A is symmetric and positive, for each p."""


def solved(apply: Apply, q: Tensor, steps: int, *parameters: Tensor) -> Tensor:
    r"""Return $x \approx A^{-1} q$, `[.., D]`, by conjugate gradients from 0.

    After n steps $\lVert x - A^{-1}q\rVert_A \le 2\big(\frac{\sqrt\kappa - 1}{\sqrt\kappa + 1}\big)^n
    \lVert A^{-1}q\rVert_A$, with κ the ratio of A's largest and least eigenvalue; after D steps it is exact but for
    rounding. Gradients are those of $A^{-1}q$, solved for in as many steps, at the x that was found: no step is kept.
    """
    return _Solved.apply(q, apply, steps, *parameters)


class _Solved(torch.autograd.Function):
    """Of x = A⁻¹q it is dx = A⁻¹(dq - dA x)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(q: Tensor, apply: Apply, steps: int, *parameters: Tensor) -> Tensor:
        x, residual, along = torch.zeros_like(q), q, q
        square, tiny = _dot(q, q), torch.finfo(q.dtype).tiny
        for _ in range(steps):
            image = apply(along, *parameters)
            length = square / _dot(along, image).clamp_min(tiny)  # both are 0 where nothing is left to solve
            x, residual = torch.addcmul(x, length, along), torch.addcmul(residual, length, image, value=-1)
            before, square = square.clamp_min(tiny), _dot(residual, residual)
            along = torch.addcmul(residual, square / before, along)
        return x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.apply_matrix, ctx.steps, *parameters = inputs
        ctx.save_for_backward(output, *parameters)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, parameters = ctx.saved_tensors[0], ctx.saved_tensors[1:]
        found = solved(ctx.apply_matrix, grad, ctx.steps, *parameters)
        pull = torch.func.vjp(lambda *own: ctx.apply_matrix(x, *own), *parameters)[1]
        return found, None, None, *pull(-found)


def factorised(system: Tensor, right: Tensor) -> Tensor:
    """Return right times the inverse of a positive `system` `[.., D, D]`, by a Cholesky factor in float32 at least."""
    wide = torch.promote_types(system.dtype, torch.float32)
    # positive unless it is not finite, and then the result is not, either: no need to wait and ask
    factor, _ = torch.linalg.cholesky_ex(system.to(wide))
    return torch.cholesky_solve(right.to(wide).mT, factor).mT.to(right.dtype)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)
