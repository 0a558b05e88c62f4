"""A matrix memory whose transition is a diagonal less any matrix of rank one, exact and parallel within chunks."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

from torch import Tensor

from nestopt.core.precision import Precision
from nestopt.core.token_batch import TokenBatch
from nestopt.levels.matrix.by_channel import Correction, channel_scan
from nestopt.levels.matrix.segments import chunk_for, memory_of, operate


def rank_one(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    ask: Tensor,
    along: Tensor,
    decay: float | Tensor | None = None,
    state: Tensor | None = None,
    chunk: int | None = None,
    read: Literal["after", "before"] = "after",
    mask: Tensor | None = None,
    cu_seqlens: Any = None,
    precision: Precision = "float32",
    validate: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Run a matrix memory that takes off along one key what it answers to another, one for every sequence and head.

    $$M_t = M_{t-1}\,(\mathrm{Diag}(\alpha_t) - a_t b_t^\top) + v_t k_t^\top,
    \qquad y_t = M_t q_t \quad (\text{or } M_{t-1} q_t)$$

    RWKV-7 (Peng et al. 2025) with $a = \hat\kappa$ and $b = a\odot\hat\kappa$; the delta rule with $a = \alpha\odot k$,
    $b = \eta k$ and ηv for v. The result does not depend on `chunk`.

    Args:
        q, k: `[B, T, H, D_k]`, T >= 1.
        v: `[B, T, H, D_v]`.
        ask: a, at which the memory before the token is asked, `[B, T, H, D_k]`.
        along: b, along which the answer is taken off, likewise.
        decay: α, what is kept of the memory at each token: None (all), one number, `[H]` or `[B, T, H]`, or one for
            each channel of the keys, `[B, T, H, D_k]`; 0 or more.
        state: M before the first token, `[B, H, D_v, D_k]`; None is zero.
        chunk: tokens computed at once; None takes what is fast: 32 on a CPU, else 64.
        read: whether a token reads the memory after or before its own write.
        mask: `[B, T]`, True for a token, False for padding, which neither writes nor decays and is answered with 0.
        cu_seqlens: where sequences begin that lie end to end in one row (B = 1), and where the last ends.
        precision: of the products (`nestopt.core.precision`): `"float32"`, `"tf32"` or `"bfloat16"`.
        validate: also refuse decays outside [0, 1] and numbers that are not finite; waits for the device.

    Returns:
        y `[B, T, H, D_v]` in the dtype of v, and M after the last token (of each sequence of `cu_seqlens`). M and all
        that is computed is float32, or float64 if v is. A token with a number that is not finite is answered with NaN
        and neither writes nor decays.

    Raises:
        ValueError: for shapes that do not fit, no tokens, a negative decay, `chunk` < 1, another word for `read`, or a
            `precision` that the device lacks.
    """
    return operate(
        "rank_one",
        partial(rank_one_scan, read=read),
        q,
        k,
        v,
        {"decay": 1.0 if decay is None else decay, "ask": ask, "along": along},
        state,
        memory_of,
        chunk=chunk_for(q) if chunk is None else chunk,
        read=read,
        mask=mask,
        cu_seqlens=cu_seqlens,
        precision=precision,
        validate=validate,
        by_channel=("decay", "ask", "along"),
    )


def rank_one_scan(
    x: TokenBatch, gates: Mapping[str, Tensor], memory: Tensor, size: int, *, read: str
) -> tuple[Tensor, Tensor]:
    """Run over whole chunks of `size` tokens, from M `[B, H, D_v, D_k]`: y `[B, H, T, D_v]` and M after them."""
    ask, along = (x.gate(gates[name], 0.0) for name in ("ask", "along"))
    decay = x.gate(gates["decay"], 1.0)
    decay = decay if decay.ndim == 4 else decay[..., None].expand_as(x.k)
    correction = Correction(ask, along, None, before=True)
    return channel_scan(x.q, decay, memory, size, plain=(x.k, x.v), correction=correction, before=read == "before")
