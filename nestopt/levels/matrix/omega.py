"""The Omega rule: a matrix memory that learns the last few pairs at each token, exact and parallel within chunks."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nestopt.core.padding import from_places, places, to_places
from nestopt.core.precision import Precision
from nestopt.core.token_batch import TokenBatch, check_finite, check_whole
from nestopt.core.tree import State
from nestopt.levels.matrix.chunk_matrix import answers, corrected, shares
from nestopt.levels.matrix.segments import chunks_of, first, log_gate, operate, rates


def omega(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lr: float | Tensor,
    window: int,
    weights: float | Tensor | None = None,
    decay: float | Tensor | None = None,
    state: Mapping[str, Tensor] | None = None,
    chunk: int = 64,
    read: Literal["after", "before"] = "after",
    mask: Tensor | None = None,
    cu_seqlens: Any = None,
    precision: Precision = "float32",
    validate: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""Run a matrix memory with one step a token on the last c pairs together (NL eq. 68; Atlas, Behrouz et al.
    2025).

    $$M_t = \alpha_t M_{t-1} - \eta_t \sum_{j=0}^{\min(c, t) - 1} w_j\, (M_{t-1} k_{t-j} - v_{t-j})\, k_{t-j}^\top,
    \qquad y_t = M_t q_t \quad (\text{or } M_{t-1} q_t)$$

    With c = 1 it is the delta rule with `decay_first=False`. A token costs about as much as c tokens of that rule.

    Args:
        q, k: `[B, T, H, D_k]`, T >= 1.
        v: `[B, T, H, D_v]`.
        lr: η, one number, `[H]` or `[B, T, H]`; 0 or more. The memory stays bounded where η times the greatest
            eigenvalue of $\sum_j w_j k_{t-j} k_{t-j}^\top$ is at most 2.
        window: c, of how many pairs the error is taken, 1 or more.
        weights: w: None (all 1), a number of which $w_j$ is the j-th power, or `[c]`, $w_0$ of the token itself.
        decay: α, what is kept of the memory at each token: None (all), one number, `[H]` or `[B, T, H]`; 0 or more.
            Computed as logarithms; a decay below the least normal number of the dtype counts as that.
        state: from a former call; None is a memory of zero and no pairs.
        chunk: pairs computed at once: chunk // c tokens, at least one. The result does not depend on it.
        read: whether a token reads the memory after or before its own write.
        mask: `[B, T]`, True for a token, False for padding, which neither writes nor decays, is answered with 0 and
            takes no place in the window.
        cu_seqlens: where sequences begin that lie end to end in one row (B = 1), and where the last ends.
        precision: of the products (`nestopt.core.precision`): `"float32"`, `"tf32"` or `"bfloat16"`.
        validate: also refuse gates outside their ranges, [0, 1] and [0, 2] for `lr`, and numbers that are not finite;
            waits for the device.

    Returns:
        y `[B, T, H, D_v]` in the dtype of v, and the state after the last token: "memory" M `[B, H, D_v, D_k]`, "keys"
        `[B, H, n, D_k]` and "values" `[B, H, n, D_v]`, the last n = min(t, c - 1) pairs, where pairs of zeros at the
        front stand for padding. All is computed and kept in float32, or float64 if v is. A token with a number that is
        not finite is answered with NaN and is as padding to others.

    Raises:
        ValueError: for shapes that do not fit, no tokens, a negative gate, `chunk` or `window` < 1, another word for
            `read`, a state that is not of such a call, or a `precision` that the device lacks.
    """
    check_whole("chunk", chunk, 1)
    check_whole("window", window, 1)
    if validate and isinstance(weights, Tensor):
        check_finite(weights=weights)
    return operate(
        "omega",
        partial(omega_scan, read=read, weight=weights_of(weights, window, q)),
        q,
        k,
        v,
        {"lr": lr, "decay": decay},
        state,
        partial(_begun, window=window),
        chunk=max(1, chunk // window),
        read=read,
        mask=mask,
        cu_seqlens=cu_seqlens,
        precision=precision,
        validate=validate,
        rows=window,
    )


def omega_scan(
    x: TokenBatch, gates: Mapping[str, Tensor], state: State, size: int, *, read: str, weight: Tensor
) -> tuple[Tensor, State]:
    """Run over whole chunks of `size` tokens: y `[B, H, T, D_v]`, and the memory and the last pairs after them.

    `state` and what is returned are as `omega` has them; `weight` is w `[c]`.
    """
    window = len(weight)
    keys, values, pairs = _windows(x, state, window)
    keys, values = (chunks_of(part, size * window) for part in (keys, values))
    queries = chunks_of(x.q, size)
    after = shares(log_gate(x, gates, "decay", size), queries)
    lr = (rates(x, gates, size)[..., None] * weight.to(x.dtype)).flatten(-2)
    error = after.before().repeated(window, window)
    u, begun, memory = corrected(keys, values, lr, error, (after.last().repeated(1, window),), state["memory"])
    y = answers(queries, keys, u, (after if read == "after" else after.before()).repeated(1, window), begun)
    return y.flatten(2, 3), {"memory": memory, **pairs}


def _windows(x: TokenBatch, state: Mapping[str, Tensor], window: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The `window` last keys and values at each token, itself first, `[B, H, T c, D]`; and the pairs to be kept."""
    kept = state["keys"].shape[2]
    live = F.pad(x.active, (kept, 0), value=True)
    place = places(live)  # pairs of padding, which are zero, lie before all others
    ago = torch.arange(window, device=place.device)
    wanted = (place[..., kept:, None] + (window - 1) - ago).flatten(-2)
    rows, pairs = [], {}
    for name, new in (("keys", x.k), ("values", x.v)):
        ordered = to_places(torch.cat([state[name], new], dim=2), place)
        rows.append(from_places(F.pad(ordered, (0, 0, window - 1, 0)), wanted))
        count = ordered.shape[2]
        pairs[name] = ordered[:, :, count - min(count, window - 1) :]
    return rows[0], rows[1], pairs


def weights_of(weights: float | Tensor | None, window: int, like: Tensor) -> Tensor:
    """Return w `[c]`, in float32 at least."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    if isinstance(weights, Tensor) and weights.ndim > 0:
        if weights.shape != (window,):
            raise ValueError(f"weights has the shape {list(weights.shape)}; with window={window} it must be {[window]}")
        return weights.to(dtype)
    ago = torch.arange(window, device=like.device, dtype=dtype)
    return torch.ones_like(ago) if weights is None else weights**ago


def _begun(state: Mapping[str, Tensor] | None, x: TokenBatch, *, window: int) -> dict[str, Tensor]:
    """Memory and pairs, checked."""
    dim_k, dim_v = x.k.shape[-1], x.v.shape[-1]
    shapes = {"memory": (dim_v, dim_k), "keys": (0, dim_k), "values": (0, dim_v)}
    if state is not None:
        if not isinstance(state, Mapping) or set(state) != set(shapes):
            found = f"has the keys {sorted(state)}" if isinstance(state, Mapping) else f"is a {type(state).__name__}"
            raise ValueError(f"state {found}; it must have 'keys', 'memory' and 'values'")
        pairs = state["keys"].shape[2] if state["keys"].ndim == 4 else 0
        if pairs >= window:
            raise ValueError(f"state['keys'] holds {pairs} pairs; with window={window} it must be {window - 1} at most")
        shapes |= {"keys": (pairs, dim_k), "values": (pairs, dim_v)}
    return {
        name: first(None if state is None else state[name], x, shape, f"state[{name!r}]")
        for name, shape in shapes.items()
    }
