"""Linear attention with decay, exact and parallel within chunks of tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from nestopt.core.device import no_autocast
from nestopt.core.precision import Precision, check_products, products_in
from nestopt.core.token_batch import Tokens, check_finite, packed
from nestopt.core.token_checks import check_choice, check_tokens, check_whole
from nestopt.levels.matrix.chunk_matrix import added, answers, shares
from nestopt.levels.matrix.segments import check_gates, chunk_for, chunks_of, first, log_gate, over_segments


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    decay: float | Tensor | None = None,
    state: Tensor | None = None,
    chunk: int | None = None,
    read: Literal["after", "before"] = "after",
    features: Callable[[Tensor], Tensor] | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Any = None,
    precision: Precision = "float32",
    validate: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""A matrix memory of dot products (NL eq. 14-18, 64), for every sequence and head.

    $$M_t = a_t M_{t-1} + v_t \phi(k_t)^\top, \qquad y_t = M_t \phi(q_t) \quad (\text{or } M_{t-1} \phi(q_t))$$

    Within a chunk, with $\Gamma_{ts} = \prod_{s<r\le t} a_r$ and M the memory that the chunk began with,
    $Y = (\Gamma \odot Q K^\top) V + \gamma \odot Q M^\top$; only memories pass from chunk to chunk. The result does not
    depend on `chunk`, which trades memory (T · chunk numbers per head) for the length of the loop (T / chunk).

    Args:
        q, k: `[B, T, H, D_k]`, T >= 1.
        v: `[B, T, H, D_v]`.
        decay: a, what is kept of the memory at each token: None (all), one number, `[H]` or `[B, T, H]`; 0 or more.
            Computed as logarithms; a decay below the least normal number of the dtype counts as that.
        state: M before the first token, `[B, H, D_v, D_k]` (D_k as the features have it); None is zero.
        chunk: tokens computed at once; None takes what is fast: 32 on a CPU, else 64.
        read: whether a token reads the memory after or before its own write.
        features: φ, a map of the last dimension; None is the identity.
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
    chunk = chunk_for(q) if chunk is None else chunk
    check_whole("chunk", chunk, 1)
    check_choice("read", read, ("after", "before"))
    check_tokens(q, k, v)
    check_products(precision, q.device, v.dtype)
    if cu_seqlens is not None:
        arguments: dict[str, Any] = {"decay": decay, "state": state, "chunk": chunk, "read": read, "features": features}
        arguments |= {"mask": mask, "precision": precision, "validate": validate}
        return packed(linear_attention, q, k, v, cu_seqlens, **arguments)
    gates = {} if decay is None else {"decay": decay}
    check_gates(gates, validate)
    if validate:
        check_finite(q=q, k=k, v=v, state=state)

    def run(x: Tokens, gates: Mapping[str, Tensor], memory: Tensor | None, size: int) -> tuple[Tensor, Tensor]:
        x = x if features is None else _featured(x, features)
        memory = first(memory, x.v, (*x.v.shape[:2], x.v.shape[-1], x.k.shape[-1]))
        queries, keys, values = (chunks_of(part, size) for part in (x.q, x.k, x.v))
        after = shares(log_gate(x, gates, "decay", size), keys)
        begun, memory = added(keys, values, after.last(), memory)
        y = answers(queries, keys, values, after if read == "after" else after.before(), begun)
        return y.flatten(2, 3), memory

    with no_autocast(q.device), products_in(precision):
        return over_segments(run, q, k, v, gates, state, chunk=chunk, mask=mask)


def _featured(x: Tokens, features: Callable[[Tensor], Tensor]) -> Tokens:
    """Features in the place of queries and keys; still 0 where a token is not live."""
    q, k = (torch.where(x.live[..., None], features(part), 0.0) for part in (x.q, x.k))
    return dataclasses.replace(x, q=q, k=k)
