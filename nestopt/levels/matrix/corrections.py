"""Writes that correct what a matrix memory answers, for all tokens of a chunk at once, and their backward pass.

The backward pass is written out: it is the same loop over chunks, backwards, between products for all chunks at once,
and takes a third of the time that autograd's takes. It is made of torch operations and can be differentiated again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nestopt.core.precision import Product, plus_matmul, plus_matmul_, product


def corrections(
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    pairs: Tensor,
    starts: Tensor | None,
    writes: Tensor | None,
    turn: Tensor | None,
    memory: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Writes u of which each is its token's error, given those before it in its chunk.

    $$u_t = \eta_t\,\Bigl(v_t - \sum_i \gamma_{ti} M_{0i} k_t - \sum_{s<t} \kappa_{ts} (k_s^\top k_t)\, u_s\Bigr)$$

    A chunk begins with m memories $M_{0i}$ (one; with momentum two) and ends with
    $\sum_j A_{ij} M_{0j} + \sum_t w_{it} u_t k_t^\top$.

    Args:
        k, v: `[B, H, N, C, D]`.
        lr: η, `[B, H, N, C]`.
        pairs: κ, `[B, H, N, C, C]` or what broadcasts, of which only what is below the diagonal is taken.
        starts: γ, `[B, H, N, C, m]`; None is 1.
        writes: w, `[B, H, N, C, m]`; None is 1.
        turn: A, `[B, H, N, m, m]`; None is 1.
        memory: before the first chunk, `[B, H, D_v, m D_k]`.

    Returns:
        u `[B, H, N, C, D_v]`, the memories that the chunks begin with `[B, H, N, D_v, m D_k]`, and the last.
    """
    u, begun, end, _ = _Corrections.apply(k, v, lr, pairs, starts, writes, turn, memory, product())
    return u, begun, end


def _inverse(lower: Tensor) -> Tensor:
    """(I + L)^-T, of which L is below the diagonal of `[.., C, C]`. The solver is faster from the right."""
    eye = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device).expand_as(lower)
    return torch.linalg.solve_triangular(lower.mT, eye, upper=True, left=False, unitriangular=True)


def _scaled(k: Tensor, shares: Tensor | None) -> Tensor:
    """Keys `[.., C, D]` times each of m shares `[.., C, m]`, side by side: `[.., C, m D]`."""
    if shares is None:
        return k
    if shares.shape[-1] == 1:
        return k * shares
    return (k[..., None, :] * shares[..., None]).flatten(-2)


def _turned(memory: Tensor, turn: Tensor | None) -> Tensor:
    """Return A M: m memories `[G, D_v, m D_k]`, mixed by `[G, m, m]`."""
    if turn is None:
        return memory
    if turn.shape[-1] == 1:
        return memory * turn
    parts = memory.unflatten(-1, (turn.shape[-1], -1))
    return (turn[:, None, :, :, None] * parts[:, :, None]).sum(-2).flatten(-2)


def _by_chunk(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Return `[B, H, N, ..]`, several of them, as N times as many of `[B H, ..]`."""
    return list(zip(*(x.flatten(0, 1).unbind(1) for x in tensors), strict=True))


def _turns(turn: Tensor | None, chunks: int) -> Sequence[Tensor | None]:
    """Return A of each chunk."""
    return [None] * chunks if turn is None else turn.flatten(0, 1).unbind(1)


def _joined(xs: list[Tensor], batch: int) -> Tensor:
    """N of `[B H, ..]` as `[B, H, N, ..]`."""
    return torch.stack(xs, dim=1).unflatten(0, (batch, -1))


class _Corrections(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        k: Tensor,
        v: Tensor,
        lr: Tensor,
        pairs: Tensor,
        starts: Tensor | None,
        writes: Tensor | None,
        turn: Tensor | None,
        memory: Tensor,
        multiply: Product,
    ) -> tuple[Tensor, ...]:
        inverse = _inverse(multiply(k, k.mT) * (pairs * lr[..., None]))
        known = _scaled(k, -lr[..., None] if starts is None else -lr[..., None] * starts)
        chunks = _by_chunk(inverse, v * lr[..., None], known, _scaled(k, writes))
        batch, memory = memory.shape[0], memory.flatten(0, 1)
        us, begun = [], []
        for (solve, value, key, write), turned in zip(chunks, _turns(turn, len(chunks)), strict=True):
            begun.append(memory)
            us.append(multiply(solve.mT, plus_matmul(value, key, memory.mT, multiply)))
            memory = plus_matmul(_turned(memory, turned), us[-1].mT, write, multiply)
        return _joined(us, batch), _joined(begun, batch), memory.unflatten(0, (batch, -1)), inverse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        u, begun, _, inverse = output
        ctx.mark_non_differentiable(inverse)
        ctx.save_for_backward(*inputs[:-2], u, begun, inverse)
        ctx.multiply = inputs[-1]

    @staticmethod
    def backward(ctx: Any, to_u: Tensor, to_begun: Tensor, to_end: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        k, v, lr, pairs, starts, writes, turn, u, begun, inverse = ctx.saved_tensors
        eta, multiply = lr[..., None], ctx.multiply
        gram = multiply(k, k.mT)
        if torch.is_grad_enabled():  # the saved one is a constant; this will be differentiated
            inverse = _inverse(gram * (pairs * eta))
        starts_by_lr = -eta if starts is None else -eta * starts
        z, to_ends, to_memory = _backwards(
            to_u, to_begun, to_end, inverse, _scaled(k, starts_by_lr), _scaled(k, writes), turn, multiply
        )
        to_known, to_written = multiply(z, begun), multiply(u, to_ends)
        below = torch.ones_like(gram[0, 0, 0]).tril(-1)
        to_lower = multiply(z, u.mT) * -below
        to_pairs = to_lower * gram
        to_gram = to_lower * (pairs * eta)
        by_start, by_write = _dots(to_known, k), _dots(to_written, k)
        to_k = _plus_gathered(_gathered(to_written, writes), to_known, starts_by_lr)
        to_k = _plus_product(to_k, to_gram + to_gram.mT, k, multiply)
        to_lr = (to_pairs * pairs).sum(-1) + (z * v).sum(-1)
        to_lr = to_lr - (by_start if starts is None else by_start * starts).sum(-1)
        return (
            to_k,
            z * eta,
            to_lr,
            to_pairs * eta if ctx.needs_input_grad[3] else None,
            None if starts is None else -eta * by_start,
            None if writes is None else by_write,
            None if turn is None else _to_turn(to_ends, begun, turn.shape[-1]),
            to_memory,
            None,
        )


def _plus_product(grad: Tensor, left: Tensor, right: Tensor, multiply: Product) -> Tensor:
    """grad + left right, in place where nobody will differentiate this."""
    if torch.is_grad_enabled():
        return grad + multiply(left, right)
    plus_matmul_(grad.flatten(0, 2), left.flatten(0, 2), right.flatten(0, 2), multiply)
    return grad


def _backwards(
    to_u: Tensor,
    to_begun: Tensor,
    to_end: Tensor,
    inverse: Tensor,
    known: Tensor,
    written: Tensor,
    turn: Tensor | None,
    multiply: Product,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loop over chunks, from the last: gradients of the solved systems, of chunks' ends and of the first memory."""
    batch, to_memory = to_end.shape[0], to_end.flatten(0, 1)
    chunks = _by_chunk(to_u, to_begun, inverse, known, written)
    turns = _turns(None if turn is None else turn.mT, len(chunks))
    zs, to_ends = [], []
    for (to_write, to_start, solve, key, write), turned in zip(chunks[::-1], turns[::-1], strict=True):
        to_ends.append(to_memory)
        zs.append(multiply(solve, plus_matmul(to_write, write, to_memory.mT, multiply)))
        to_memory = plus_matmul(_turned(to_memory, turned) + to_start, zs[-1].mT, key, multiply)
    return _joined(zs[::-1], batch), _joined(to_ends[::-1], batch), to_memory.unflatten(0, (batch, -1))


def _dots(x: Tensor, k: Tensor) -> Tensor:
    """Return `[.., C, m D]` times `[.., C, D]`, summed: `[.., C, m]`."""
    return (x.unflatten(-1, (-1, k.shape[-1])) * k[..., None, :]).sum(-1)


def _gathered(x: Tensor, shares: Tensor | None) -> Tensor:
    """Return the transposed of `_scaled`: `[.., C, m D]` to `[.., C, D]`."""
    if shares is None:
        return x
    if shares.shape[-1] == 1:
        return x * shares
    return (x.unflatten(-1, (shares.shape[-1], -1)) * shares[..., None]).sum(-2)


def _plus_gathered(total: Tensor, x: Tensor, shares: Tensor) -> Tensor:
    """total + what `_gathered` gives."""
    return torch.addcmul(total, x, shares) if shares.shape[-1] == 1 else total + _gathered(x, shares)


def _to_turn(to_ends: Tensor, begun: Tensor, count: int) -> Tensor:
    """Return the gradient `[B, H, N, m, m]` of A."""
    if count == 1:
        return (to_ends * begun).sum((-2, -1))[..., None, None]
    ends, starts = (x.unflatten(-1, (count, -1)) for x in (to_ends, begun))
    return (ends[..., :, None, :] * starts[..., None, :, :]).sum((-4, -1))
