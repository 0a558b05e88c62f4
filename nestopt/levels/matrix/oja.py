"""Oja's rule on a matrix memory, gated, exact and parallel within chunks of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

from torch import Tensor

from nestopt.core.precision import Precision
from nestopt.core.token_batch import TokenBatch
from nestopt.levels.matrix.chunk_matrix import answers, corrected, shares
from nestopt.levels.matrix.segments import chunks_of, log_gate, memory_of, operate, rates


def oja(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lr: float | Tensor,
    decay: float | Tensor | None = None,
    state: Tensor | None = None,
    chunk: int = 64,
    read: Literal["after", "before"] = "after",
    mask: Tensor | None = None,
    cu_seqlens: Any = None,
    precision: Precision = "float32",
    validate: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Run a matrix memory that learns by Oja's rule (NL eq. 66-67), one for every sequence and head.

    $$M_t = \alpha_t M_{t-1} + \eta_t\, v_t (k_t - M_{t-1}^\top v_t)^\top,
    \qquad y_t = M_t q_t \quad (\text{or } M_{t-1} q_t)$$

    It is the delta rule on the transposed memory, which is asked with v for k, and is computed as that. The result does
    not depend on `chunk`.

    Args:
        q, k: `[B, T, H, D_k]`, T >= 1.
        v: `[B, T, H, D_v]`.
        lr: η, one number, `[H]` or `[B, T, H]`; 0 or more. With values of length 1 and η in [0, 2] the memory stays
            bounded.
        decay: α, what is kept of the memory at each token: None (all), one number, `[H]` or `[B, T, H]`; 0 or more.
            Computed as logarithms; a decay below the least normal number of the dtype counts as that.
        state: M before the first token, `[B, H, D_v, D_k]`; None is zero.
        chunk: tokens computed at once.
        read: whether a token reads the memory after or before its own write.
        mask: `[B, T]`, True for a token, False for padding, which neither writes nor decays and is answered with 0.
        cu_seqlens: where sequences begin that lie end to end in one row (B = 1), and where the last ends.
        precision: of the products (`nestopt.core.precision`): `"float32"`, `"tf32"` or `"bfloat16"`.
        validate: also refuse gates outside their ranges, [0, 1] and [0, 2] for `lr`, and numbers that are not finite;
            waits for the device.

    Returns:
        y `[B, T, H, D_v]` in the dtype of v, and M after the last token (of each sequence of `cu_seqlens`). M and all
        that is computed is float32, or float64 if v is. A token with a number that is not finite is answered with NaN
        and neither writes nor decays.

    Raises:
        ValueError: for shapes that do not fit, no tokens, a negative gate, `chunk` < 1, another word for `read`, or a
            `precision` that the device lacks.
    """
    return operate(
        "oja",
        partial(oja_scan, read=read),
        q,
        k,
        v,
        {"lr": lr, "decay": decay},
        state,
        memory_of,
        chunk=chunk,
        read=read,
        mask=mask,
        cu_seqlens=cu_seqlens,
        precision=precision,
        validate=validate,
    )


def oja_scan(
    x: TokenBatch, gates: Mapping[str, Tensor], memory: Tensor, size: int, *, read: str
) -> tuple[Tensor, Tensor]:
    """Run over whole chunks of `size` tokens, from M `[B, H, D_v, D_k]`: y `[B, H, T, D_v]` and M after them."""
    queries, keys, values = (chunks_of(part, size) for part in (x.q, x.k, x.v))
    after = shares(log_gate(x, gates, "decay", size), keys)
    u, begun, end = corrected(values, keys, rates(x, gates, size), after.before(), (after.last(),), memory.mT)
    y = answers(queries, u, values, after if read == "after" else after.before(), begun.mT)
    return y.flatten(2, 3), end.mT
