"""Softmax attention over all pairs so far, or the last few."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nestopt.core.memories import FADED
from nestopt.core.packing import Packing
from nestopt.core.padding import from_places, places, to_places
from nestopt.core.precision import Precision, check_products, current, products_in
from nestopt.core.token_batch import TokenBatch, check_finite, check_tokens, refuse_mask


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    state: Mapping[str, Tensor] | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Any = None,
    precision: Precision = "float32",
    validate: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""Attend to the pairs that a memory keeps (NL eq. 62-63).

    $$y_t = \sum_s \mathrm{softmax}_s(q_t k_s^\top/\sqrt{D_k})\, v_s$$

    The sum runs over the tokens up to t: all of them, or the last `window`, t among them. With a window, blocks of that
    many tokens see their own and the block before, so that time and memory grow as T · window.

    Args:
        q, k: `[B, T, H, D_k]`, T >= 1.
        v: `[B, T, H, D_v]`. With fewer heads in k and v (a number n that divides H) the first H / n queries share the
            first key and value, and so on: grouped-query attention, whose state has n heads.
        window: how many pairs are kept; None keeps all.
        state: the pairs kept so far, `{"keys": [B, H, n, D_k], "values": [B, H, n, D_v]}`, and after a call with a
            mask `"mask": [B, n]`; None is no pairs.
        mask: `[B, T]`, True for a token, False for padding, which no token sees, takes no place in the window and is
            answered with 0.
        cu_seqlens: where sequences begin that lie end to end in one row (B = 1), and where the last ends.
        precision: of the products: `"bfloat16"` rounds float32 queries, keys and values for torch's kernel, which gives
            back bfloat16; `"tf32"` leaves that kernel as it is, and is for those of the reference machine.
        validate: refuse numbers that are not finite; waits for the device.

    Returns:
        y `[B, T, H, D_v]` and the state after the last token, in the dtypes of k and v. A token with a number that is
        not finite is answered with NaN and kept as a pair of zeros.

    Raises:
        ValueError: for shapes that do not fit, no tokens, `window` < 1, or a `precision` that the device lacks.
    """
    check_tokens(q, k, v, shared=True)
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise ValueError(f"window={window!r} is not allowed; give a whole number of tokens, 1 or more, or None")
    check_products(precision, q.device, v.dtype)
    if validate:
        check_finite(q=q, k=k, v=v)
    packing = None
    if cu_seqlens is not None:
        refuse_mask(mask, q)
        packing = Packing.of(cu_seqlens, q, "attention")
        (q, k, v), mask = (packing.unpack(x) for x in (q, k, v)), packing.mask
    tokens = TokenBatch.of(q, k, v, mask, widen=False, shared=True)
    with products_in(precision):
        y, pairs = attend(tokens, state, window)
    y = tokens.answer(y)
    return y if packing is None else packing.pack(y), pairs


def attend(
    tokens: TokenBatch, state: Mapping[str, Tensor] | None, window: int | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Answer tokens `[B, H, T, D_v]`, and keep their pairs; `state` and what is returned are as `attention` has them.

    A token that is not finite is kept as a pair of zeros.
    """
    past, mask, k, v = checked(state, tokens.k, tokens.v), tokens.mask, tokens.k, tokens.v
    if mask is None and past is not None and "mask" in past:
        mask = torch.ones_like(tokens.active[:, 0])
    if mask is None:
        if past is not None:
            k, v = (torch.cat([past[name].to(new.dtype), new], dim=2) for name, new in (("keys", k), ("values", v)))
        y, pairs = _attend(tokens.q, k, v, None, window), {"keys": k, "values": v}
    else:
        y, pairs = _attend_padded(tokens.q, k, v, mask, past, window)
    if window is not None:
        pairs = {name: x[:, -window:] if name == "mask" else x[:, :, -window:] for name, x in pairs.items()}
    return y, pairs


def read_pairs(q: Tensor, pairs: Mapping[str, Tensor]) -> Tensor:
    """Attend from q `[B, H, T, D_k]` to the pairs kept, all of them; zeros where there are none."""
    keys, values = (pairs[name].to(q.dtype) for name in ("keys", "values"))
    if not keys.shape[2]:
        return values.new_zeros(*q.shape[:3], values.shape[-1])
    if "mask" not in pairs and FADED not in pairs:
        return softmax_read(q, keys, values)
    bias = pairs[FADED][:, :, None].to(q.dtype) if FADED in pairs else None
    if "mask" not in pairs:
        return softmax_read(q, keys, values, attn_mask=bias)
    some = pairs["mask"].any(-1)[:, None, None, None]
    seen = pairs["mask"][:, None, None] | ~some  # lest a token see nothing
    bias = seen if bias is None else torch.where(seen, bias, -torch.inf)
    return torch.where(some, softmax_read(q, keys, values, attn_mask=bias), 0.0)


def softmax_read(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """Attend by torch's kernels, which let heads share k and v, at the precision of `nestopt.core.precision`."""
    options |= {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
    if current() != "bfloat16" or v.dtype != torch.float32:
        return F.scaled_dot_product_attention(q, k, v, **options)
    q, k, v = (x.bfloat16() for x in (q, k, v))
    if (mask := options.get("attn_mask")) is not None and mask.is_floating_point():
        options["attn_mask"] = mask.bfloat16()
    return F.scaled_dot_product_attention(q, k, v, **options).float()


def _attend_padded(
    q: Tensor, k: Tensor, v: Tensor, live: Tensor, past: Mapping[str, Tensor] | None, window: int | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Attention and pairs where only `live` `[B, T]` are tokens; padding goes to the front, out of the last pairs."""
    here, seen = places(live)[:, None], live
    if past is not None:
        flags = past.get("mask", torch.ones_like(past["keys"][:, 0, :, 0], dtype=torch.bool))
        k, v = (torch.cat([past[name].to(new.dtype), new], dim=2) for name, new in (("keys", k), ("values", v)))
        seen = torch.cat([flags, live], dim=1)
    place = places(seen)
    k, v = (to_places(x, place[:, None]) for x in (k, v))
    seen = torch.zeros_like(seen).scatter(1, place, seen)
    y = from_places(_attend(to_places(q, here), k, v, seen, window), here)
    return torch.where(live[:, None, :, None], y, 0.0), {"keys": k, "values": v, "mask": seen}


def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, window: int | None) -> Tensor:
    """Answers to q `[B, H, T, D]`, the last T tokens of k, v; only those of `seen` `[B, n + T]` are attended to."""
    length = q.shape[2]
    if window is None or length <= window:
        return _direct(q, k, v, seen, window)
    split = k.shape[2] - length
    early = slice(0, split + window)
    y = _direct(q[:, :, :window], k[:, :, early], v[:, :, early], None if seen is None else seen[:, early], window)
    seen = None if seen is None else seen[:, split:]
    return torch.cat([y, _blockwise(q[:, :, window:], k[:, :, split:], v[:, :, split:], seen, window)], dim=2)


def _direct(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, window: int | None) -> Tensor:
    """Attend with one mask over all pairs of a query and a key, or none where none is needed."""
    length = q.shape[2]
    if window is not None:  # the first token looks furthest back
        k, v = (x[:, :, -(window + length - 1) :] for x in (k, v))
        seen = None if seen is None else seen[:, -(window + length - 1) :]
    past = k.shape[2] - length
    if seen is None and past == 0:
        return softmax_read(q, k, v, is_causal=True)
    if seen is None and length == 1:
        return softmax_read(q, k, v)
    ago = torch.arange(past, past + length, device=q.device)[:, None] - torch.arange(k.shape[2], device=q.device)
    allowed = ago >= 0 if window is None else (ago >= 0) & (ago < window)
    if seen is not None:
        allowed = (allowed & seen[:, None, None]) | (ago == 0)  # padding sees itself, lest it see nothing
    return softmax_read(q, k, v, attn_mask=allowed)


def _blockwise(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, window: int) -> Tensor:
    """Blocks of `window` queries see two blocks of keys; q begins one block after k, v."""
    batch, length = q.shape[0], q.shape[2]
    rest = -length % window

    def blocks(x: Tensor, size: int) -> Tensor:
        """Return `[B, H, T, D]` as `[B m, H, size, D]`: each block with what lies before it, up to `size`."""
        x = F.pad(x, (0, 0, 0, rest)) if rest else x
        return x.unfold(2, size, window).mT.transpose(1, 2).flatten(0, 1)

    queries, keys, values = blocks(q, window), blocks(k, 2 * window), blocks(v, 2 * window)
    row, column = torch.arange(window, device=q.device)[:, None], torch.arange(2 * window, device=q.device)
    allowed = (column > row) & (column <= row + window)
    if seen is not None:
        near = F.pad(seen, (0, rest)).unfold(1, 2 * window, window).flatten(0, 1)
        allowed = (allowed & near[:, None, None]) | (column == row + window)
    y = softmax_read(queries, keys, values, attn_mask=allowed)
    return y.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)[:, :, :length]


def checked(state: Mapping[str, Tensor] | None, k: Tensor, v: Tensor) -> Mapping[str, Tensor] | None:
    """Return `state`, checked against keys and values `[B, H, T, D]`."""
    if state is None:
        return None
    if set(state) - {"mask"} != {"keys", "values"}:
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
    if "mask" in state and state["mask"].shape != (k.shape[0], pairs):
        raise ValueError(f"state['mask'] has the shape {list(state['mask'].shape)}; it must be {[k.shape[0], pairs]}")
    return state
