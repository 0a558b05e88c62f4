"""Inverse roots of symmetric matrices, batched."""

from __future__ import annotations

import contextlib
import math

import torch
from torch import Tensor

from nestopt.core.device import by_contract


def inverse_root(gram: Tensor, order: int, eps: float = 1e-6) -> Tensor:
    r"""Return $(A + \epsilon\,\lambda_{\max} I)^{-1/p}$ by eigendecomposition.

    Negative eigenvalues (rounding) count as 0. A matrix of zeros has the identity as its root. On a GPU the
    decomposition waits for the device, as `torch.linalg.eigh` checks there that it converged.

    It can be differentiated once, also where eigenvalues coincide, where the derivative of the eigenvectors does not
    exist and that of the root does.

    Args:
        gram: A `[..., n, n]`, symmetric, positive semidefinite; each matrix on its own.
        order: p, a power of 2.
        eps: ε > 0.

    Returns:
        `[..., n, n]` in the dtype of `gram`; calculated in float32 or wider.
    """
    if order < 1 or order & (order - 1):
        raise ValueError(f"order={order!r} is not allowed; give a power of 2")
    a = gram.to(torch.promote_types(gram.dtype, torch.float32))
    size = torch.linalg.vector_norm(a.detach(), math.inf, (-2, -1), keepdim=True) if a.numel() else a.new_ones(())
    size = torch.where(size > 0, size, 1.0)  # ε times a small eigenvalue would vanish
    a = a / size
    values, vectors = eigen(a)
    largest = values[..., -1:].clamp_min(0)
    values = values.clamp_min(0) + torch.where(largest > 0, eps * largest, 1.0)
    roots = values ** (1 / order)
    inverse = (vectors / roots.unsqueeze(-2)) @ vectors.mT
    if torch.is_grad_enabled():
        inverse = inverse + _derivative(a - a.detach(), roots, vectors, order, eps)
    return (inverse * size ** (-1 / order)).to(gram.dtype)


def eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues `[..., n]`, rising, and vectors of symmetric matrices, in float32 or wider, without gradients.

    On a GPU it waits for the device.
    """
    wide = matrix.detach().to(torch.promote_types(matrix.dtype, torch.float32))
    with by_contract("eigh") if wide.device.type != "cpu" else contextlib.nullcontext():
        return torch.linalg.eigh(wide)


def _derivative(change: Tensor, roots: Tensor, vectors: Tensor, order: int, eps: float) -> Tensor:
    """Return what a `change` of A does to the inverse root in first order (Daleckii & Krein): here 0 with a derivative.

    In the eigenbasis it is the change times the divided differences of x^(-1/p), which for r = x^(1/p) are
    -1 / (r_i r_j (r_i + r_j)(r_i² + r_j²)(r_i⁴ + r_j⁴)…): nothing cancels where two eigenvalues are close.
    """
    change = vectors.mT @ change @ vectors
    shift = eps * change[..., -1, -1]  # the largest eigenvalue changes, too
    change = change + torch.diag_embed(shift.unsqueeze(-1).expand(change.shape[:-1]))
    r, s = roots.unsqueeze(-1), roots.unsqueeze(-2)
    below, power = r * s, 1
    while power < order:
        below, power = below * (r**power + s**power), 2 * power
    return vectors @ (-change / below.clamp_min(torch.finfo(below.dtype).tiny)) @ vectors.mT
