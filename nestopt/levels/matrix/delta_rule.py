"""The delta rule on a matrix memory, gated and with momentum, exact and parallel within chunks of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from nestopt.core.precision import Precision
from nestopt.core.token_batch import TokenBatch
from nestopt.levels.matrix.by_channel import Correction, channel_scan
from nestopt.levels.matrix.chunk_matrix import GateShares, answers, corrected, shares, shares_with_momentum
from nestopt.levels.matrix.segments import (
    chunk_for,
    chunks_of,
    first,
    is_by_channel,
    log_gate,
    memory_of,
    operate,
    rates,
)


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lr: float | Tensor,
    decay: float | Tensor | None = None,
    momentum: float | Tensor | None = None,
    state: Tensor | Mapping[str, Tensor] | None = None,
    chunk: int | None = None,
    read: Literal["after", "before"] = "after",
    decay_first: bool = True,
    mask: Tensor | None = None,
    cu_seqlens: Any = None,
    precision: Precision = "float32",
    validate: bool = False,
) -> tuple[Tensor, Any]:
    r"""Run a matrix memory that corrects its error, gated, one for every sequence and head.

    With $\tilde M_t = \alpha_t M_{t-1}$ (gated DeltaNet: Yang et al. 2024; NL eq. 65), or with
    `decay_first=False` $\tilde M_t = M_{t-1}$ (a step of gradient descent from a memory that then decays):

    $$M_t = \alpha_t M_{t-1} + \eta_t\,(v_t - \tilde M_t k_t)\, k_t^\top,
    \qquad y_t = M_t q_t \quad (\text{or } M_{t-1} q_t)$$

    and with momentum

    $$S_t = \theta_t S_{t-1} + \eta_t\,(\tilde M_t k_t - v_t)\, k_t^\top, \qquad M_t = \alpha_t M_{t-1} - S_t,$$

    S a sum of gradients, as in `deep_memory`.

    The result does not depend on `chunk`. Within a chunk the errors solve one unit lower triangular system; only
    memories pass from chunk to chunk.

    Args:
        q, k: `[B, T, H, D_k]`, T >= 1.
        v: `[B, T, H, D_v]`.
        lr: η, one number, `[H]` or `[B, T, H]`; 0 or more. With keys of length 1 and η in [0, 2] the memory stays
            bounded.
        decay: α, what is kept of the memory at each token: None (all), one number, `[H]` or `[B, T, H]`; 0 or more.
            Without momentum it may be one for each channel of the keys, `[B, T, H, D_k]`, that is
            $M_{t-1}\,\mathrm{Diag}(\alpha_t)$ (KDA, Kimi Team 2025).
        momentum: θ, what is kept of the momentum, likewise; None is no momentum. α and θ are computed as logarithms;
            one below the least normal number of the dtype counts as that.
        state: M before the first token, `[B, H, D_v, D_k]`; with momentum `{"memory": M, "momentum": S}`. None is zero.
        chunk: tokens computed at once; None takes what is fast: 32 on a CPU, else 64.
        read: whether a token reads the memory after or before its own write.
        decay_first: whether the error is that of the decayed memory.
        mask: `[B, T]`, True for a token, False for padding, which neither writes nor decays and is answered with 0.
        cu_seqlens: where sequences begin that lie end to end in one row (B = 1), and where the last ends.
        precision: of the products (`nestopt.core.precision`): `"float32"`, `"tf32"` or `"bfloat16"`.
        validate: also refuse gates outside their ranges, [0, 1] and [0, 2] for `lr`, and numbers that are not finite;
            waits for the device.

    Returns:
        y `[B, T, H, D_v]` in the dtype of v, and the state after the last token (of each sequence of `cu_seqlens`),
        as it is given. The state and all that is computed is float32, or float64 if v is. A token with a number that
        is not finite is answered with NaN and neither writes nor decays.

    Raises:
        ValueError: for shapes that do not fit, no tokens, a negative gate, `chunk` < 1, another word for `read`, or a
            `precision` that the device lacks.
    """
    gates = {"lr": lr, "decay": decay, "momentum": momentum}
    if momentum is not None and isinstance(decay, Tensor) and decay.ndim == 4:
        raise ValueError(
            f"decay has the shape {list(decay.shape)}, one for each channel; with momentum give one for each token and "
            "head"
        )
    y, end = operate(
        "delta_rule",
        partial(delta_scan, read=read, decay_first=decay_first),
        q,
        k,
        v,
        gates,
        state,
        memory_of if momentum is None else memory_and_momentum,
        chunk=chunk_for(q) if chunk is None else chunk,
        read=read,
        mask=mask,
        cu_seqlens=cu_seqlens,
        precision=precision,
        validate=validate,
        by_channel=("decay",),
    )
    return y, end if momentum is None else apart(end)


def delta_scan(
    x: TokenBatch, gates: Mapping[str, Tensor], memory: Tensor, size: int, *, read: str, decay_first: bool
) -> tuple[Tensor, Tensor]:
    """Run over whole chunks of `size` tokens: y `[B, H, T, D_v]`, and the memory (with momentum, both) after them.

    `memory` is M `[B, H, D_v, D_k]`; where there is a gate `momentum`, M and S side by side, `[B, H, D_v, 2 D_k]`.
    """
    if is_by_channel(gates):
        lr = x.gate(gates["lr"], 0.0)[..., None]
        correction = Correction(x.k, lr * x.k, x.v, before=not decay_first)
        decay = x.gate(gates["decay"], 1.0)
        return channel_scan(x.q, decay, memory, size, correction=correction, before=read == "before")
    q, k, v = (chunks_of(part, size) for part in (x.q, x.k, x.v))
    after, error, ends = _shares(x, gates, k, size, decay_first)
    u, begun, memory = corrected(k, v, rates(x, gates, size), error, ends, memory)
    return answers(q, k, u, after if read == "after" else after.before(), begun).flatten(2, 3), memory


def _shares(
    x: TokenBatch, gates: Mapping[str, Tensor], k: Tensor, size: int, decay_first: bool
) -> tuple[GateShares, GateShares, tuple[GateShares, ...]]:
    """Return the shares of M after each token, of the memory whose error is taken, and of the chunks' ends."""
    log_decay = log_gate(x, gates, "decay", size)
    log_momentum = log_gate(x, gates, "momentum", size)
    if log_momentum is None:
        after = shares(log_decay, k)
        # what the error is taken of leaves out the token's own write anyway
        return after, after if decay_first or log_decay is None else after.before(), (after.last(),)
    after, ends = shares_with_momentum(log_decay, log_momentum, x.active.unflatten(-1, (-1, size)))
    error = after.before()
    if decay_first and log_decay is not None:
        error = error.times(log_decay.exp())
    return after, error, ends


def memory_and_momentum(state: Mapping[str, Tensor] | None, x: TokenBatch) -> Tensor:
    """Return M and S side by side, of a state that is checked; None is 0."""
    shape = (x.v.shape[-1], x.k.shape[-1])
    if state is None:
        return first(None, x, (shape[0], 2 * shape[1]))
    if not isinstance(state, Mapping) or set(state) != {"memory", "momentum"}:
        found = f"has the keys {sorted(state)}" if isinstance(state, Mapping) else f"is a {type(state).__name__}"
        raise ValueError(f"state {found}; with momentum it must have 'memory' and 'momentum'")
    return torch.cat([first(state[name], x, shape, f"state[{name!r}]") for name in ("memory", "momentum")], dim=-1)


def apart(both: Tensor) -> dict[str, Tensor]:
    """Return M and S, of both side by side."""
    return dict(zip(("memory", "momentum"), both.chunk(2, dim=-1), strict=True))
