"""A recurrence run over segments of its tokens, each of whole chunks; and what its operations do to their arguments."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nestopt.core.device import no_autocast
from nestopt.core.packing import Packing
from nestopt.core.precision import Precision, check_products, products_in
from nestopt.core.token_batch import (
    TokenBatch,
    check_choice,
    check_finite,
    check_range,
    check_state,
    check_tokens,
    check_whole,
    per_token,
    refuse_mask,
)
from nestopt.kernels.products import logarithm

RANGES = {"decay": (0.0, 1.0), "momentum": (0.0, 1.0), "lr": (0.0, 2.0)}
"""Where gates lie, both ends allowed: a memory with keys of length 1 then does not grow by itself."""

CACHED = 1 << 18
"""About how many numbers a tensor of a segment has on a CPU: larger ones leave its cache."""

Scan = Callable[[TokenBatch, Mapping[str, Tensor], Any, int], tuple[Tensor, Any]]
"""Takes a segment's tokens, its gates (`[B, H, T]`, or 1 where constant; by channel `[B, H, T, D_k]`), the state and
the length of a chunk, of which the segment is a multiple; returns `[B, H, T, D_v]` and the state."""


def chunk_for(x: Tensor) -> int:
    """Return how many tokens a matrix memory is computed for at once, where nobody says how many."""
    return 32 if x.device.type == "cpu" else 64


def operate(
    name: str,
    scan: Scan,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Mapping[str, float | Tensor | None],
    state: Any,
    begun: Callable[[Any, TokenBatch], Any],
    *,
    chunk: int,
    read: str,
    mask: Tensor | None,
    cu_seqlens: Any,
    precision: Precision,
    validate: bool,
    rows: int = 1,
    by_channel: Sequence[str] = (),
) -> tuple[Tensor, Any]:
    """Run an operation of `nestopt.ops` on arguments as a caller gives them: check them, lay them out, scan.

    Args:
        name: of the operation, for errors.
        scan: the recurrence.
        q, k, v: `[B, T, H, D]`.
        gates: by name; None is a gate that is not there.
        state: as the caller gave it.
        begun: makes of that, checked, what `scan` takes.
        chunk, read, mask, cu_seqlens, precision, validate: of the operation.
        rows: how many writes a token is to the kernel.
        by_channel: gates that may be one for each channel of the keys.

    Returns:
        y `[B, T, H, D_v]` in the dtype of v, and what `scan` leaves.
    """
    check_whole("chunk", chunk, 1)
    check_choice("read", read, ("after", "before"))
    check_tokens(q, k, v)
    check_products(precision, q.device, v.dtype)
    present = {name: value for name, value in gates.items() if value is not None}
    check_gates(present, validate)
    if validate:
        check_finite(q=q, k=k, v=v, **(state if isinstance(state, Mapping) else {"state": state}))
    packing = None
    if cu_seqlens is not None:
        refuse_mask(mask, q)
        packing = Packing.of(cu_seqlens, q, name)
        present = {name: packing.unpack_like(value, q) for name, value in present.items()}
        (q, k, v), mask = (packing.unpack(x) for x in (q, k, v)), packing.mask
    dtype = torch.promote_types(v.dtype, torch.float32)
    made = {name: per_token(name, value, q, dtype, by_channel=name in by_channel) for name, value in present.items()}
    tokens = TokenBatch.of(q, k, v, mask, *made.values())
    with no_autocast(q.device), products_in(precision):
        y, end = over_segments(scan, tokens, made, begun(state, tokens), chunk, rows)
    y = tokens.answer(y)
    return y if packing is None else packing.pack(y), end


def check_gates(gates: Mapping[str, float | Tensor], validate: bool) -> None:
    """Raise ValueError for a number below 0; with `validate`, for anything not finite or outside its range."""
    for name, value in gates.items():
        if not isinstance(value, Tensor) and not value >= 0:
            raise ValueError(f"{name}={value!r} is not allowed; give a number of 0 or more")
        if validate:
            if isinstance(value, Tensor):
                check_finite(**{name: value})
            check_range(name, value, *RANGES.get(name, (-math.inf, math.inf)))


def over_segments(
    scan: Scan, tokens: TokenBatch, gates: Mapping[str, Tensor], state: Any, chunk: int, rows: int = 1
) -> tuple[Tensor, Any]:
    """Return y `[B, H, T, D_v]` and the state of `scan`, segment after segment; a rest of T is a shorter chunk."""
    length = tokens.k.shape[2]
    lengths = _lengths(tokens, chunk, rows)
    parts = {name: x.split(lengths, dim=2) for name, x in gates.items() if x.shape[2] == length}
    ys = []
    for n, segment in enumerate(tokens.split(lengths)):
        here = {name: parts[name][n] if name in parts else x for name, x in gates.items()}
        y, state = scan(segment, here, state, min(chunk, lengths[n]))
        ys.append(y)
    return ys[0] if len(ys) == 1 else torch.cat(ys, dim=2), state


def _lengths(tokens: TokenBatch, chunk: int, rows: int) -> list[int]:
    """Return the lengths of the segments: all whole chunks, on a CPU as many as stay in its cache; then the rest."""
    batch, heads, length, dim_k = tokens.k.shape
    chunks, rest = length // chunk, length % chunk  # a compiler that knows no length has no divmod
    most = max(1, chunks)
    if tokens.k.device.type == "cpu":
        width = max(dim_k, tokens.v.shape[-1], chunk * rows)
        most = min(most, max(1, CACHED // (batch * heads * chunk * rows * width)))
    lengths = [most * chunk] * (chunks // most) + [chunks % most * chunk, rest]
    return [length for length in lengths if length]


def memory_of(state: Tensor | Mapping[str, Tensor] | None, tokens: TokenBatch) -> Tensor:
    """Return a state that is M `[B, H, D_v, D_k]` alone, checked; None is 0."""
    shape = (tokens.v.shape[-1], tokens.k.shape[-1])
    if isinstance(state, Mapping):
        wanted = [*tokens.k.shape[:2], *shape]
        raise ValueError(f"state has the keys {sorted(state)}; without momentum it must be a tensor {wanted}")
    return first(state, tokens, shape)


def first(state: Tensor | None, tokens: TokenBatch, shape: tuple[int, ...], name: str = "state") -> Tensor:
    """Return `state` in the dtype that is computed in, if it is `[B, H, *shape]`; None is 0."""
    whole = (*tokens.k.shape[:2], *shape)
    return tokens.k.new_zeros(whole) if state is None else check_state(name, state, whole, tokens.dtype)


def log_gate(x: TokenBatch, gates: Mapping[str, Tensor], name: str, chunk: int) -> Tensor | None:
    """Return logarithms of a gate, `[B, H, N, chunk]`, 0 at tokens that are not active; None without the gate.

    A constant is one number, but where a token is not active.
    """
    return gate_chunks(logarithm(x.gate(gates[name], 1.0)), chunk) if name in gates else None


def is_by_channel(gates: Mapping[str, Tensor]) -> bool:
    """Return whether the decay is one for each channel, `[B, H, T, D_k]`."""
    return "decay" in gates and gates["decay"].ndim == 4


def rates(x: TokenBatch, gates: Mapping[str, Tensor], chunk: int) -> Tensor:
    """η `[B, H, N, chunk]`, 0 at tokens that are not active."""
    return gate_chunks(x.gate(gates["lr"], 0.0), chunk)


def chunks_of(x: Tensor, chunk: int) -> Tensor:
    """Return `[B, H, T, D]` to `[B, H, N, chunk, D]`."""
    return x.unflatten(2, (-1, chunk))


def gate_chunks(gate: Tensor, chunk: int) -> Tensor:
    """Return `[B, H, T]` to `[B, H, N, chunk]`."""
    return gate.unflatten(-1, (-1, chunk))
