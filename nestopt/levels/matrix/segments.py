"""A recurrence run over segments of its tokens, each of whole chunks; and the gates that come with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nestopt.core.token_batch import Tokens, check_finite, check_mask, check_range, check_state, per_token, tokens
from nestopt.kernels.products import logarithm

RANGES = {"decay": (0.0, 1.0), "momentum": (0.0, 1.0), "lr": (0.0, 2.0)}
"""Where gates lie, both ends allowed: a memory with keys of length 1 then does not grow by itself."""

CACHED = 1 << 18
"""About how many numbers a tensor of a segment has on a CPU: larger ones leave its cache."""

Run = Callable[[Tokens, Mapping[str, Tensor], Any, int], tuple[Tensor, Any]]


def chunk_for(x: Tensor) -> int:
    """Tokens that a matrix memory is computed for at once, where nobody says how many."""
    return 32 if x.device.type == "cpu" else 64


def check_gates(gates: Mapping[str, float | Tensor], validate: bool) -> None:
    """Raise ValueError for a number below 0; with `validate`, for anything not finite or outside its range."""
    for name, value in gates.items():
        if not isinstance(value, Tensor) and not value >= 0:
            raise ValueError(f"{name}={value!r} is not allowed; give a number of 0 or more")
        if validate:
            if isinstance(value, Tensor):
                check_finite(**{name: value})
            check_range(name, value, *RANGES[name])


def over_segments(
    run: Run,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Mapping[str, float | Tensor],
    state: Any,
    *,
    chunk: int,
    mask: Tensor | None,
    rows: int = 1,
) -> tuple[Tensor, Any]:
    """y `[B, T, H, D_v]` and the state of `run`, segment after segment, in float32 or float64.

    Args:
        run: takes a segment's tokens, its gates (`[B, H, T]`, or 1 where constant), the state and the length of a
            chunk, of which the segment is a multiple; returns `[B, H, T, D_v]` and the state.
        q, k, v: as the caller gave them, `[B, T, H, D]`.
        gates: by name, as the caller gave them.
        state: before the first token.
        chunk: tokens computed at once; a rest of T is a shorter chunk.
        mask: `[B, T]` or None.
        rows: how many writes a token is to the kernel.
    """
    if mask is not None:
        check_mask(mask, q.shape[0], q.shape[1])
    dtype = torch.promote_types(v.dtype, torch.float32)
    made = {name: per_token(name, value, q, dtype) for name, value in gates.items()}
    lengths = _lengths(q, v, chunk, rows)
    parts = {name: x.split(lengths, dim=-1) for name, x in made.items() if x.shape[-1] == q.shape[1]}
    masks: Sequence[Tensor | None] = [None] * len(lengths) if mask is None else mask.split(lengths, dim=1)
    ys = []
    cut = [x.split(lengths, dim=1) for x in (q, k, v)]
    for n, length in enumerate(lengths):
        here = {name: parts[name][n] if name in parts else x for name, x in made.items()}
        x = tokens(cut[0][n], cut[1][n], cut[2][n], masks[n], *here.values())
        y, state = run(x, here, state, min(chunk, length))
        ys.append(x.answer(y))
    return ys[0] if len(ys) == 1 else torch.cat(ys, dim=1), state


def _lengths(q: Tensor, v: Tensor, chunk: int, rows: int) -> list[int]:
    """Of the segments: as many chunks as there are, on a CPU as stay in its cache; then the rest of the last chunk."""
    batch, length, heads, dim_k = q.shape
    chunks, rest = length // chunk, length % chunk  # a compiler that knows no length has no divmod
    most = max(1, chunks)
    if q.device.type == "cpu":
        most = min(most, max(1, CACHED // (batch * heads * chunk * rows * max(dim_k, v.shape[-1], chunk * rows))))
    lengths = [most * chunk] * (chunks // most) + [chunks % most * chunk, rest]
    return [length for length in lengths if length]


def first(state: Tensor | None, v: Tensor, shape: tuple[int, ...], name: str = "state") -> Tensor:
    """`state` in the dtype that is computed in, if it has `shape`; None is 0."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    return v.new_zeros(shape, dtype=dtype) if state is None else check_state(name, state, shape, dtype)


def log_gate(x: Tokens, gates: Mapping[str, Tensor], name: str, chunk: int) -> Tensor | None:
    """Logarithms `[B, H, N, chunk]` of a gate that leaves all as it is at tokens that are not live; None without it."""
    return gate_chunks(logarithm(x.gate(gates[name], 1.0)), chunk) if name in gates else None


def rates(x: Tokens, gates: Mapping[str, Tensor], chunk: int) -> Tensor:
    """η `[B, H, N, chunk]`, 0 at tokens that are not live."""
    return gate_chunks(x.gate(gates["lr"], 0.0), chunk)


def chunks_of(x: Tensor, chunk: int) -> Tensor:
    """`[B, H, T, D]` to `[B, H, N, chunk, D]`."""
    return x.unflatten(2, (-1, chunk))


def gate_chunks(gate: Tensor, chunk: int) -> Tensor:
    """`[B, H, T]` to `[B, H, N, chunk]`; a constant `[.., 1]` to as many of itself `[.., 1, chunk]`."""
    if gate.shape[-1] == 1:
        return gate[..., None].expand(*gate.shape, chunk)
    return gate.unflatten(-1, (-1, chunk))
