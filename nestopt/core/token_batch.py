"""What every operation on tokens does to its arguments first: checks, masks, dtypes, one layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nestopt.core.device import by_contract
from nestopt.core.packing import Packing
from nestopt.core.part import nearest


@dataclasses.dataclass(frozen=True)
class TokenBatch:
    """Queries, keys and values of a call, checked and laid out as kernels take them. Inside, nobody checks again.

    Attributes:
        q, k: `[B, H, T, D_k]`, in `dtype`; 0 where a token is not `active`. Where heads share keys and values, k and v
            have fewer heads.
        v: `[B, H, T, D_v]`, likewise.
        active: `[B, H, T]`, whether a token is written: it is no padding, and finite.
        finite: `[B, H, T]`, whether all numbers of a token are finite; padding counts as that.
        mask: `[B, T]`, as it was given: True for a token, False for padding; None where there is no padding.
        dtype: in which is computed.
        dtype_in: of v as it was given, and of the answers.
        reads: whether tokens may be asked that are not written.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    active: Tensor
    finite: Tensor
    mask: Tensor | None
    dtype: torch.dtype
    dtype_in: torch.dtype
    reads: bool = False

    @staticmethod
    def of(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None = None,
        *gates: Tensor,
        widen: bool = True,
        shared: bool = False,
    ) -> TokenBatch:
        """Check q, k `[B, T, H, D_k]`, v `[B, T, H, D_v]` and `mask` `[B, T]` (True: a token, False: padding).

        A token that is padding, or in which q, k, v or a gate (of `gates`, as from `per_token`) is not finite, is
        neither written nor answered with anything of the memory's: so it can't spread. Nothing here waits for the
        device. What is narrower than float32 is widened to it, unless `widen` is False. If `shared`, k and v may have
        fewer heads than q; a token that is not finite in one of the heads that share a key is not in any.
        """
        check_tokens(q, k, v, shared=shared)
        dtype_in, dtype = v.dtype, torch.promote_types(v.dtype, torch.float32)
        if widen:
            q, k, v = (x.to(dtype) for x in (q, k, v))
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        finite = _finite(q, dtype)
        for gate in gates:
            finite = finite & (gate if gate.ndim == 3 else gate.sum(-1)).isfinite()
        finite = shared_by(finite, k.shape[1]) & _finite(k, dtype) & _finite(v, dtype)
        active = finite
        if mask is not None:
            check_mask(mask, q.shape[0], q.shape[2])
            active = finite & mask[:, None]
        k, v = (torch.where(active[..., None], x, 0) for x in (k, v))
        finite = finite if mask is None else finite | ~mask[:, None]
        active, finite = (for_queries(x, q.shape[1]) for x in (active, finite))
        q = torch.where(active[..., None], q, 0)
        return TokenBatch(q, k, v, active, finite, mask, dtype, dtype_in)

    @property
    def count(self) -> Tensor:
        """`[B, H]`: how many tokens are written; of one token each, whether it is."""
        return self.active[..., 0] if self.active.shape[-1] == 1 else self.active.sum(-1)

    @property
    def length(self) -> int | Tensor:
        """How many tokens each row has, those that are not finite among them: T, or `[B, 1]` where there is padding."""
        return self.active.shape[2] if self.mask is None else self.mask.sum(-1, keepdim=True)

    def gate(self, value: Tensor, idle: float) -> Tensor:
        """Return `value` (as from `per_token`) `[B, H, T]` or `[B, H, T, D_k]`, `idle` where a token is not written."""
        return torch.where(self.active if value.ndim < 4 else self.active[..., None], value, idle)

    def answer(self, y: Tensor) -> Tensor:
        """`[B, H, T, D_v]` as the caller gets it: `[B, T, H, D_v]`; NaN where the token itself was not finite."""
        if y.shape[2] == 1:
            y = torch.where(self.finite[..., None], y, torch.nan)
        else:  # whose backward pass is shorter
            y = y.masked_fill(~self.finite[..., None], torch.nan)
        return y.transpose(1, 2).to(self.dtype_in)

    def replace(self, **tensors: Tensor) -> TokenBatch:
        """Put other queries, keys or values in, which are set to 0 where a token is not active."""
        cleared: dict[str, Any] = {
            name: torch.where(shared_by(self.active, x.shape[1])[..., None], x, 0) for name, x in tensors.items()
        }
        return dataclasses.replace(self, **cleared)

    def written_where(self, live: Tensor) -> TokenBatch:
        """Leave tokens out of what is written, but where `live` `[B, T]`: they are answered, and take their places."""
        active = self.active & live[:, None]
        k, v = (torch.where(active[..., None], x, 0) for x in (self.k, self.v))
        return dataclasses.replace(self, k=k, v=v, active=active, reads=True)

    def split(self, lengths: Sequence[int]) -> list[TokenBatch]:
        """In pieces of so many tokens."""
        if len(lengths) == 1:
            return [self]
        cut = [x.split(list(lengths), dim=2) for x in (self.q, self.k, self.v, self.active, self.finite)]
        masks = [None] * len(lengths) if self.mask is None else self.mask.split(list(lengths), dim=1)
        return [
            dataclasses.replace(self, q=q, k=k, v=v, active=active, finite=finite, mask=mask)
            for q, k, v, active, finite, mask in zip(*cut, masks, strict=True)
        ]


def shared_by(flag: Tensor, heads: int) -> Tensor:
    """Return `[B, H, ..]` as `[B, heads, ..]`, whether a flag holds in all the heads that share a key and a value."""
    return flag if flag.shape[1] == heads else flag.unflatten(1, (heads, -1)).all(2)


def for_queries(x: Tensor, heads: int, dim: int = 1) -> Tensor:
    """Return what as many or fewer heads share for each of `heads`: the first for the first few, and so on."""
    return x if x.shape[dim] == heads else x.repeat_interleave(heads // x.shape[dim], dim)


def _finite(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`[.., D]` to `[..]`: whether all are finite, and their sum (one pass; no product would be finite either)."""
    return x.detach().sum(-1, dtype=dtype).isfinite()


def check_mask(mask: Tensor, batch: int, length: int) -> None:
    """Raise ValueError unless `mask` is boolean `[B, T]`."""
    if mask.dtype != torch.bool:
        raise ValueError(f"mask is {mask.dtype}; it must be bool: True for a token, False for padding")
    if mask.shape != (batch, length):
        raise ValueError(f"mask has the shape {list(mask.shape)}; for this input it must be {[batch, length]}")


def per_token(name: str, value: float | Tensor, q: Tensor, dtype: torch.dtype, *, by_channel: bool = False) -> Tensor:
    """Return a gate `[B, T, H]`, a constant or one per head `[H]`, as `[B, H, T]` (not expanded where it need not be).

    `q` is `[B, T, H, D_k]`, as given by the caller. With `by_channel` a gate may be of its shape, and is returned as
    `[B, H, T, D_k]`.

    Raises:
        ValueError: for another shape.
    """
    if not isinstance(value, Tensor):
        return q.new_full((1, 1, 1), float(value), dtype=dtype)
    if value.ndim == 0:
        return value.to(dtype).reshape(1, 1, 1)
    if value.ndim == 1 and value.shape[0] == q.shape[2]:
        return value.to(dtype)[None, :, None]
    check_gate(name, value, q, width=q.shape[-1] if by_channel and value.ndim == 4 else None)
    return value.to(dtype).transpose(1, 2)


def check_range(name: str, value: float | Tensor, low: float, high: float, *, closed: str = "[]") -> None:
    """Raise ValueError unless all of `value` lies between `low` and `high`; waits for the device if it is there.

    `closed` says which ends belong to the range: `"[)"` keeps `low` and leaves out `high`.
    """
    x = torch.as_tensor(value).detach()
    above = x >= low if closed[0] == "[" else x > low
    below = x <= high if closed[1] == "]" else x < high
    wrong = ~(above & below)
    with by_contract("validate"):
        if bool(wrong.any()):
            first = tuple(int(i) for i in wrong.nonzero()[0]) if x.ndim else ()
            where = f"{name}{list(first)}" if first else name
            number = float(x[first] if first else x)
            raise ValueError(f"{where} is {number:g}; it must lie in {closed[0]}{low:g}, {high:g}{closed[1]}")


def check_finite(**tensors: Tensor | None) -> None:
    """Raise ValueError naming the first argument that holds NaN or infinity, and where; waits for the device."""
    for name, x in tensors.items():
        if x is None:
            continue
        x = x.detach()
        wrong = ~x.isfinite()
        with by_contract("validate"):
            if bool(wrong.any()):
                first = [int(i) for i in wrong.nonzero()[0]]
                raise ValueError(
                    f"{name}{first} is {float(x[tuple(first)])}; {int(wrong.sum())} such numbers are in {name}"
                )


def check_state(name: str, state: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return `state` in `dtype`, or ValueError unless it has `shape` and a floating dtype."""
    if state.shape != shape:
        raise ValueError(
            f"{name} has the shape {list(state.shape)}; for these tokens it must be {list(shape)}. Is it the state of "
            "another batch or another layer?"
        )
    if not state.is_floating_point():
        raise ValueError(f"{name} is {state.dtype}; it must be of a floating dtype")
    return state.to(dtype)


def refuse_mask(mask: Tensor | None, q: Tensor) -> None:
    """Raise ValueError for a mask beside `cu_seqlens`."""
    if mask is not None:
        raise ValueError(
            f"cu_seqlens is for sequences end to end in one row, without a mask; q has the shape {list(q.shape)}"
        )


def run_unpacked(
    run: Callable[..., tuple[Tensor, Any]], q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Any, **arguments: Any
) -> tuple[Tensor, Any]:
    """Run an operation on sequences that lie end to end in one row, each by itself.

    Args:
        run: the operation; it takes a mask.
        q, k, v: `[1, N, H, D]`.
        cu_seqlens: where each of n sequences begins, and where the last ends: n + 1 numbers, from 0 to N. A list or a
            tensor; one on another device is waited for.
        arguments: of the operation. Gates `[1, N, H]` are cut with the tokens; `state` has a batch of n.

    Returns:
        y `[1, N, H, D_v]`, and the states of the n sequences.
    """
    refuse_mask(arguments.get("mask"), q)
    packing = Packing.of(cu_seqlens, q, getattr(run, "__name__", "run"))

    arguments = {key: value if key == "state" else packing.unpack_like(value, q) for key, value in arguments.items()}
    y, state = run(packing.unpack(q), packing.unpack(k), packing.unpack(v), **{**arguments, "mask": packing.mask})
    return packing.pack(y), state


def check_tokens(q: Tensor, k: Tensor, v: Tensor, *, shared: bool = False) -> None:
    """Raise ValueError unless q, k `[B, T, H, D_k]` and v `[B, T, H, D_v]` fit together and hold a token at least.

    If `shared`, k and v may have fewer heads than q, a number that divides those of q.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} has the shape {list(x.shape)}; it must be [batch, tokens, heads, width]")
    name, like = ("q", q) if k.shape[2] == q.shape[2] or not shared else ("k", k)
    if k.shape != (*q.shape[:2], like.shape[2], q.shape[3]) or q.shape[2] % max(1, k.shape[2]):
        words = "but for the number of heads, of which k's must divide q's" if name == "k" else ""
        raise ValueError(
            f"k has the shape {list(k.shape)} and q {list(q.shape)}; they must be the same" + (words and f", {words}")
        )
    if v.shape[:3] != like.shape[:3]:
        raise ValueError(
            f"v has the shape {list(v.shape)} and {name} {list(like.shape)}; they must agree in batch, tokens and heads"
        )
    if q.shape[1] == 0:
        raise ValueError(f"q has the shape {list(q.shape)}: there is no token in it; give one or more")


def check_gate(name: str, gate: Tensor, q: Tensor, *, width: int | None = None) -> None:
    """Raise ValueError unless `gate` is `[B, T, H]` for `q` `[B, T, H, D_k]`, or with a `width` `[B, T, H, width]`."""
    wanted = (*q.shape[:3], *(() if width is None else (width,)))
    if gate.shape != wanted:
        raise ValueError(
            f"{name} has the shape {list(gate.shape)} and q {list(q.shape)}; it must be {list(wanted)}, "
            f"{'a number' if width is None else f'{width} numbers'} for each token and head"
        )


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        hint = nearest(value, allowed) if isinstance(value, str) else ""
        raise ValueError(f"{name}={value!r} is not allowed; give one of {', '.join(map(repr, allowed))}.{hint}")


def check_whole(name: str, value: object, least: int) -> None:
    """Raise ValueError unless `value` is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} is not allowed; give a whole number, {least} or more")
