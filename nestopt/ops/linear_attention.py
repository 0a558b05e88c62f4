"""Linear attention with decay, exact and parallel within chunks of tokens."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nestopt.ops.shapes import check_gate, check_tokens


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    decay: float | Tensor | None = None,
    state: Tensor | None = None,
    chunk: int = 64,
    read: Literal["after", "before"] = "after",
) -> tuple[Tensor, Tensor]:
    r"""A matrix memory of dot products (NL eq. 14-18, 64), for every sequence and head.

    $$M_t = a_t M_{t-1} + v_t k_t^\top, \qquad y_t = M_t q_t \quad (\text{or } M_{t-1} q_t)$$

    Within a chunk, with $\Gamma_{ts} = \prod_{s<r\le t} a_r$ and M the memory that the chunk began with,
    $Y = (\Gamma \odot Q K^\top) V + \gamma \odot Q M^\top$; only memories pass from chunk to chunk. The result does not
    depend on `chunk`, which trades memory (T · chunk numbers per head) for the length of the loop (T / chunk).

    Args:
        q, k: `[B, T, H, D_k]`, T >= 1.
        v: `[B, T, H, D_v]`.
        decay: a, what is kept of the memory at each token: None (all), one number, `[H]` or `[B, T, H]`; 0 or more.
            Computed as logarithms; a decay below the least normal number of the dtype counts as that.
        state: M before the first token, `[B, H, D_v, D_k]`; None is zero.
        chunk: tokens computed at once.
        read: whether a token reads the memory after or before its own write.

    Returns:
        y `[B, T, H, D_v]` in the dtype of v, and M after the last token. M and all that is computed is float32, or
        float64 if v is.

    Raises:
        ValueError: for shapes that do not fit, no tokens, a negative decay, `chunk` < 1, or another word for `read`.
    """
    check_tokens(q, k, v)
    (batch, length, heads, dim_k), dim_v = q.shape, v.shape[-1]
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"chunk={chunk!r} is not allowed; give a whole number of tokens, 1 or more")
    if read not in ("after", "before"):
        raise ValueError(f"read={read!r} is not allowed; give 'after' or 'before'")
    if state is not None and state.shape != (batch, heads, dim_v, dim_k):
        raise ValueError(
            f"state has the shape {list(state.shape)}; for q {list(q.shape)} and v {list(v.shape)} it must be "
            f"{[batch, heads, dim_v, dim_k]}"
        )
    given, dtype = v.dtype, torch.promote_types(v.dtype, torch.float32)
    log_decay = _log_decay(decay, q, dtype)
    chunk = min(chunk, length)
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = (_blocks(x.to(dtype).transpose(1, 2), chunk) for x in (q, k, v))
        kept = _blocks(log_decay[..., None], chunk)[..., 0]
        start = q.new_zeros(batch, heads, dim_v, dim_k, dtype=dtype) if state is None else state.to(dtype)
        y, end = _parallel(q, k, v, kept, start, read)
    return y[:, :, :length].transpose(1, 2).to(given), end


def _log_decay(decay: float | Tensor | None, q: Tensor, dtype: torch.dtype) -> Tensor:
    """Logarithms `[B or 1, H or 1, T]`."""
    _, length, heads, _ = q.shape
    if isinstance(decay, Tensor):
        if decay.shape == (heads,):
            decay = decay[None, None].expand(1, length, heads)
        else:
            check_gate("decay", decay, q)
        return decay.to(dtype).clamp_min(torch.finfo(dtype).tiny).log().transpose(1, 2)
    if decay is None:
        return q.new_zeros(1, 1, length, dtype=dtype)
    if not decay >= 0:
        raise ValueError(f"decay={decay!r} is not allowed; give a number of 0 or more")
    return q.new_full((1, 1, length), decay, dtype=dtype).clamp_min(torch.finfo(dtype).tiny).log()


def _blocks(x: Tensor, chunk: int) -> Tensor:
    """`[B, H, T, D]` to `[B, H, N, chunk, D]`. What fills the last chunk, zeros, neither writes nor decays."""
    x = F.pad(x, (0, 0, 0, -x.shape[2] % chunk))
    return x.unflatten(2, (-1, chunk))


def _parallel(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, start: Tensor, read: Literal["after", "before"]
) -> tuple[Tensor, Tensor]:
    """All chunks: `[B, H, N, C, D]` and logarithms `[.., N, C]` to y `[B, H, N·C, D_v]` and the last memory."""
    gamma, since = _decays(log_decay)
    written = v.mT @ (k * gamma[..., -1, :, None])
    memory, begun = start, []
    for whole, new in zip(since[..., -1, None, None].unbind(2), written.unbind(2), strict=True):
        begun.append(memory)
        memory = whole * memory + new
    if read == "before":  # token t has seen what t - 1 left
        gamma = F.pad(gamma[..., :-1, :], (0, 0, 1, 0))
        since = F.pad(since[..., :-1], (1, 0), value=1.0)
    y = ((q @ k.mT) * gamma) @ v + since[..., None] * (q @ torch.stack(begun, dim=2).mT)
    return y.flatten(2, 3), memory


def _decays(log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """Γ `[.., C, C]`, what is left at t of what was written at s <= t (else 0), and γ `[.., C]`, of the chunk's start.

    Each logarithm is a sum of its own. Differences of one running sum would cancel, and lose all digits behind a decay
    near 0.
    """
    size = log_decay.shape[-1]
    lower = torch.ones(size, size, dtype=torch.bool, device=log_decay.device).tril()
    between = log_decay[..., None].expand(*log_decay.shape, size).masked_fill(~lower.tril(-1), 0.0).cumsum(-2)
    return between.masked_fill(~lower, -torch.inf).exp(), log_decay.cumsum(-1).exp()
