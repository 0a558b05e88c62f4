"""What every operation on tokens does to its arguments first: checks, masks, dtypes, one layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nestopt.core.device import by_contract
from nestopt.core.packing import Packing
from nestopt.core.token_checks import check_gate, check_tokens


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Queries, keys and values as the kernels take them.

    Attributes:
        q, k: `[B, H, T, D_k]`, in `dtype`; where a token is not `live` they are 0.
        v: `[B, H, T, D_v]`, likewise.
        live: `[B, H, T]`, whether a token is written.
        broken: `[B, H, T]`, whether a token holds a number that is not finite.
        dtype: in which is computed: float32, or float64 if v is.
        given: the dtype of v as it was given, and of the answers.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    live: Tensor
    broken: Tensor
    dtype: torch.dtype
    given: torch.dtype

    def gate(self, value: Tensor, idle: float) -> Tensor:
        """`value` (as from `per_token`) `[B, H, T]` with `idle` where a token is not written."""
        return torch.where(self.live, value, idle)

    def answer(self, y: Tensor) -> Tensor:
        """`[B, H, T, D_v]` as the caller gets it: `[B, T, H, D_v]`; NaN where the token itself was not finite."""
        y = y.masked_fill(self.broken[..., None], torch.nan)
        return y.transpose(1, 2).to(self.given)


def tokens(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *gates: Tensor) -> Tokens:
    """Check q, k `[B, T, H, D_k]`, v `[B, T, H, D_v]` and `mask` `[B, T]` (True: a token, False: padding).

    A token that is padding, or in which q, k, v or a gate (of `gates`, `[B, H, T]` each, from `per_token`) is not
    finite, is neither written nor answered with anything of the memory's: so it can't spread. Nothing here waits for
    the device.
    """
    check_tokens(q, k, v)
    given, dtype = v.dtype, torch.promote_types(v.dtype, torch.float32)
    q, k, v = (x.transpose(1, 2).to(dtype) for x in (q, k, v))
    finite = _finite(q) & _finite(k) & _finite(v)
    for gate in gates:
        finite = finite & gate.isfinite()
    live = finite
    if mask is not None:
        check_mask(mask, q.shape[0], q.shape[2])
        live = finite & mask[:, None]
    q, k, v = (torch.where(live[..., None], x, 0) for x in (q, k, v))
    return Tokens(q, k, v, live, ~finite if mask is None else ~finite & mask[:, None], dtype, given)


def _finite(x: Tensor) -> Tensor:
    """`[.., D]` to `[..]`: whether all are finite, and their sum (one pass; no product would be finite either)."""
    return x.detach().sum(-1).isfinite()


def check_mask(mask: Tensor, batch: int, length: int) -> None:
    """Raise ValueError unless `mask` is boolean `[B, T]`."""
    if mask.dtype != torch.bool:
        raise ValueError(f"mask is {mask.dtype}; it must be bool: True for a token, False for padding")
    if mask.shape != (batch, length):
        raise ValueError(f"mask has the shape {list(mask.shape)}; for this input it must be {[batch, length]}")


def per_token(name: str, value: float | Tensor, q: Tensor, dtype: torch.dtype) -> Tensor:
    """A gate `[B, T, H]`, a constant or one per head `[H]`, as `[B, H, T]` (not expanded where it need not be).

    `q` is `[B, T, H, D_k]`, as given by the caller.

    Raises:
        ValueError: for another shape.
    """
    if not isinstance(value, Tensor):
        return q.new_full((1, 1, 1), float(value), dtype=dtype)
    if value.ndim == 0:
        return value.to(dtype).reshape(1, 1, 1)
    if value.ndim == 1 and value.shape[0] == q.shape[2]:
        return value.to(dtype)[None, :, None]
    check_gate(name, value, q)
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
    """`state` in `dtype`, or ValueError unless it has `shape` and a floating dtype."""
    if state.shape != shape:
        raise ValueError(
            f"{name} has the shape {list(state.shape)}; for these tokens it must be {list(shape)}. Is it the state of "
            "another batch or another layer?"
        )
    if not state.is_floating_point():
        raise ValueError(f"{name} is {state.dtype}; it must be of a floating dtype")
    return state.to(dtype)


def packed(
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
    if arguments.get("mask") is not None:
        raise ValueError(
            f"cu_seqlens is for sequences end to end in one row, without a mask; q has the shape {list(q.shape)}"
        )
    packing = Packing.of(cu_seqlens, q, getattr(run, "__name__", "run"))

    def spread(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.ndim < 3 or x.shape[:2] != q.shape[:2]:
            return x
        return packing.spread(x)

    arguments = {key: value if key == "state" else spread(value) for key, value in arguments.items()}
    y, state = run(spread(q), spread(k), spread(v), **{**arguments, "mask": packing.mask})
    return packing.together(y), state
