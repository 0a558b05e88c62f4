"""Linear attention with decay, exact and parallel within chunks of tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from nestopt.core.precision import Precision
from nestopt.core.token_batch import TokenBatch
from nestopt.levels.matrix.by_channel import channel_scan
from nestopt.levels.matrix.chunk_matrix import added, answers, shares
from nestopt.levels.matrix.segments import chunk_for, chunks_of, is_by_channel, log_gate, memory_of, operate
from nestopt.levels.presets import divided


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
    normalizer: bool = False,
    mask: Tensor | None = None,
    cu_seqlens: Any = None,
    precision: Precision = "float32",
    validate: bool = False,
) -> tuple[Tensor, Tensor]:
    r"""Run a matrix memory of dot products (NL eq. 14-18, 64), one for every sequence and head.

    $$M_t = a_t M_{t-1} + v_t \phi(k_t)^\top, \qquad y_t = M_t \phi(q_t) \quad (\text{or } M_{t-1} \phi(q_t))$$

    Within a chunk, with $\Gamma_{ts} = \prod_{s<r\le t} a_r$ and M the memory that the chunk began with,
    $Y = (\Gamma \odot Q K^\top) V + \gamma \odot Q M^\top$; only memories pass from chunk to chunk. The result does not
    depend on `chunk`, which trades memory (T · chunk numbers per head) for the length of the loop (T / chunk).

    Args:
        q, k: `[B, T, H, D_k]`, T >= 1.
        v: `[B, T, H, D_v]`.
        decay: a, what is kept of the memory at each token: None (all), one number, `[H]` or `[B, T, H]`; 0 or more.
            Computed as logarithms; a decay below the least normal number of the dtype counts as that. Or one for each
            channel of the keys, `[B, T, H, D_k]` (GLA, Yang et al. 2023); `features` must then keep their number.
        state: M before the first token, `[B, H, D_v, D_k]` (D_k as the features have it); None is zero. With a
            normaliser z, which starts and fades as M does, is a row more: `[B, H, D_v + 1, D_k]`.
        chunk: tokens computed at once; None takes what is fast: 32 on a CPU, else 64.
        read: whether a token reads the memory after or before its own write.
        features: φ, a map of the last dimension; None is the identity.
        normalizer: divide the answer by $z_t^\top\phi(q_t)$ with $z_t = a_t z_{t-1} + \phi(k_t)$, 1e-6 at least,
            for features whose products are not negative (Katharopoulos et al. 2020).
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

    def scan(x: TokenBatch, gates: Mapping[str, Tensor], memory: Tensor | None, size: int) -> tuple[Tensor, Tensor]:
        x = x if features is None else x.replace(q=features(x.q), k=features(x.k))
        x = x.replace(v=torch.cat([x.v, torch.ones_like(x.v[..., :1])], dim=-1)) if normalizer else x
        y, memory = linear_scan(x, gates, memory_of(memory, x), size, read=read)
        return divided(y) if normalizer else y, memory

    return operate(
        "linear_attention",
        scan,
        q,
        k,
        v,
        {"decay": decay},
        state,
        _as_given,
        chunk=chunk_for(q) if chunk is None else chunk,
        read=read,
        mask=mask,
        cu_seqlens=cu_seqlens,
        precision=precision,
        validate=validate,
        by_channel=("decay",),
    )


def _as_given(state: Tensor | None, x: TokenBatch) -> Tensor | None:
    """Leave the state to the scan, which knows how many features there are."""
    return state


def linear_scan(
    x: TokenBatch, gates: Mapping[str, Tensor], memory: Tensor, size: int, *, read: str
) -> tuple[Tensor, Tensor]:
    """Run over whole chunks of `size` tokens, from M `[B, H, D_v, D_k]`: y `[B, H, T, D_v]` and M after them."""
    if is_by_channel(gates):
        decay = x.gate(gates["decay"], 1.0)
        return channel_scan(x.q, decay, memory, size, plain=(x.k, x.v), before=read == "before")
    queries, keys, values = (chunks_of(part, size) for part in (x.q, x.k, x.v))
    after = shares(log_gate(x, gates, "decay", size), keys)
    begun, memory = added(keys, values, after.last(), memory)
    y = answers(queries, keys, values, after if read == "after" else after.before(), begun)
    return y.flatten(2, 3), memory
