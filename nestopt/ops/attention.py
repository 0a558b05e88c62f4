"""Softmax attention over all pairs so far, or the last few."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from nestopt.ops.shapes import check_tokens


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""A memory that keeps its pairs (NL eq. 62-63), $y_t = \sum_s \mathrm{softmax}_s(q_t k_s^\top/\sqrt{D_k})\, v_s$.

    The sum runs over the tokens up to t: all of them, or the last `window`, t among them.

    Args:
        q, k: `[B, T, H, D_k]`, T >= 1.
        v: `[B, T, H, D_v]`.
        window: how many pairs are kept; None keeps all.
        state: the pairs kept so far, `{"keys": [B, H, n, D_k], "values": [B, H, n, D_v]}`; None is no pairs.

    Returns:
        y `[B, T, H, D_v]` and the state after the last token, in the dtypes of k and v.

    Raises:
        ValueError: for shapes that do not fit, no tokens, or `window` < 1.
    """
    check_tokens(q, k, v)
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise ValueError(f"window={window!r} is not allowed; give a whole number of tokens, 1 or more, or None")
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    length = q.shape[2]
    if state is not None:
        _check(state, k, v)
        k = torch.cat([state["keys"].to(k.dtype), k], dim=2)
        v = torch.cat([state["values"].to(v.dtype), v], dim=2)
    # the first token of this call looks furthest back
    k, v = (k, v) if window is None else (k[:, :, -(window + length - 1) :], v[:, :, -(window + length - 1) :])
    past = k.shape[2] - length
    if past == 0 and (window is None or window >= length):
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    elif length == 1:
        y = F.scaled_dot_product_attention(q, k, v)
    else:
        ago = torch.arange(past, past + length, device=q.device)[:, None] - torch.arange(k.shape[2], device=q.device)
        seen = ago >= 0 if window is None else (ago >= 0) & (ago < window)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    if window is not None:
        k, v = k[:, :, -window:], v[:, :, -window:]
    return y.transpose(1, 2), {"keys": k, "values": v}


def _check(state: Mapping[str, Tensor], k: Tensor, v: Tensor) -> None:
    """Raise unless `state` fits keys and values `[B, H, T, D]`."""
    if set(state) != {"keys", "values"}:
        raise ValueError(f"state has the keys {sorted(state)}; it must have 'keys' and 'values'")
    pairs = state["keys"].shape[2] if state["keys"].ndim == 4 else 0
    for name, new in (("keys", k), ("values", v)):
        wanted = (*new.shape[:2], pairs, new.shape[3])
        if state[name].shape != wanted:
            raise ValueError(
                f"state[{name!r}] has the shape {list(state[name].shape)} and this call's {name} [batch, heads, "
                f"tokens, width] {list(new.shape)}; they must agree but for the number of tokens, which must be "
                "the same for keys and values"
            )
