"""MLP memories on tokens: test-time training, Titans, DLA and the self-modifying write, a chunk at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from nestopt.core.device import no_autocast
from nestopt.core.objectives import L2, Dot
from nestopt.core.pending import COUNT
from nestopt.core.precision import Precision, check_products, products_in
from nestopt.core.token_batch import TokenBatch, check_choice, check_finite, check_range, per_token, run_unpacked
from nestopt.core.tree import State
from nestopt.levels.deep import mlp
from nestopt.levels.deep.mlp import Read, Settings
from nestopt.levels.deep.scan import WeightState, idle, scan_chunks, scan_rows

OBJECTIVES = {"l2": L2(), "dot": Dot()}
STEPS = Literal["normalized", "raw", "layerwise"]

__all__ = ["Settings", "check_weights", "deep_memory", "scan_chunks"]


def deep_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    weights: Sequence[Tensor],
    lr: float | Tensor,
    decay: float | Tensor | None = None,
    momentum: float | Tensor | None = None,
    delta: float = 0.0,
    objective: Literal["l2", "dot"] = "l2",
    step: STEPS = "normalized",
    bound: float = 1.0,
    forget: Literal["all", "outer"] = "all",
    read: Read = "after",
    activation: str = "silu",
    residual: bool = True,
    norm: bool | Literal["layer"] = False,
    state: Mapping[str, Any] | None = None,
    chunk: int = 64,
    checkpoint: int = 0,
    mask: Tensor | None = None,
    cu_seqlens: Any = None,
    precision: Precision = "float32",
    validate: bool = False,
) -> tuple[Tensor, State]:
    r"""Run an MLP that learns its tokens as they come, one for every sequence and head (NL eq. 83-91; Titans; TTT).

    With $M(x; W) = x + W_1\sigma(W_2 \dots\sigma(W_L x))$ and, per layer, its input $a_t$ and the error at its output,

    $$S_t = \theta_t S_{t-1} + \eta_t \nabla_W\ell(M(k_t; \bar W), v_t), \qquad
      W_t = \alpha_t W_{t-1} - \delta\eta_t (W_{t-1}a_t)a_t^\top - S_t, \qquad y_t = M(q_t; W_t)$$

    where $\bar W$ are the weights that the present chunk of tokens began with (eq. 90); `chunk=1` is the exact
    recurrence. Only weights pass from chunk to chunk; within one, all is matrix products.

    Args:
        q, k: `[B, T, H, D_k]`, T >= 1. Lengths of 1 are usual.
        v: `[B, T, H, D_v]`; D_v = D_k where there is a residual.
        weights: W1 `[.., D_v, hidden]`, …, W_L `[.., hidden, D_k]` at the start, the outermost first: `[out, in]` for
            all heads, `[H, out, in]`, or `[B, H, out, in]`. One weight is a matrix memory (give `residual=False`).
        lr: η̃ in (0, 1] of the normalised steps; η >= 0 of the raw one. A number, `[H]` or `[B, T, H]`, as all gates.
        decay: α in [0, 1]; None keeps all.
        momentum: θ in [0, 1); None is none: S is the gradient, and there is no state for it.
        delta: δ, 0 for none and 1 for delta gradient descent (eq. 57, 88), by each layer's own input.
        objective: `"l2"`, ½‖M(k) - v‖², or `"dot"`, -⟨M(k), v⟩.
        step: `"layerwise"`: η̃ is the share of its own error that a token's write takes off, and 1 - θ stands where S
            is added (`nestopt.levels.deep.layerwise`). `"normalized"`: η = η̃ · bound · α (1 - θ) / (ε + n), which does
            not diverge; `nestopt.levels.deep.step_size` says what n is, why, and where that ends. `"raw"`: η as it is
            given, the letter of the equations.
        bound: of a token's step with `"layerwise"`, of the chunk's whole step along any direction with `"normalized"`;
            in (0, 2): up to 1 it never overshoots.
        forget: which weights α fades, `"all"` or W1, the `"outer"` one, alone.
        read: whether a token reads the memory `"after"` its own write, `"before"` it, or as its `"chunk"` found it,
            which is the fastest.
        activation: σ, one of silu, gelu, relu, tanh, identity.
        residual: whether x is added to the read.
        norm: whether what W1 gives is divided by its root mean square; `"layer"`: its mean is taken off before.
        state: from a former call with the same settings; `weights` are then not looked at.
        chunk: C, tokens whose gradients are taken together.
        checkpoint: recompute in the backward pass all but every so many chunks' weights; 0 keeps everything. Memory is
            least near the root of the number of chunks. Chunks below 64 tokens come in blocks of 64: weights are made,
            kept and recomputed once a block.
        mask: `[B, T]`, True for tokens. Padding, wherever it is, takes no place in a chunk, is answered with 0, and
            neither writes nor fades.
        cu_seqlens: for sequences end to end in one row, q `[1, N, H, D]`: where each begins, and the end.
        precision: of the products (`nestopt.core.precision`): `"float32"`, `"tf32"` or `"bfloat16"`.
        validate: check that all numbers are finite and gates in range, at the cost of waiting for the device.

    Returns:
        y `[B, T, H, D_v]` in the dtype of v, and the state: `"weights"` and `"momentum"` by name (`[B, H, out, in]`,
        float32, or float64 if v is) at the start of a chunk that is not over, and its tokens so far in `"pending"`,
        with their `"count"` `[B]` where rows differ in it.

    A token that is not finite is not written, and only its own answer is NaN.

    Raises:
        ValueError: for shapes that do not fit, an option that is not allowed, a state of another memory, or a
            `precision` that the device lacks; with `validate`, for numbers out of range or not finite.
    """
    check_choice("objective", objective, tuple(OBJECTIVES))
    arguments = {"lr": lr, "decay": decay, "momentum": momentum, "mask": mask, "state": state}
    settings = Settings(
        form=mlp.Form(activation, residual, norm),
        delta=float(delta),
        objective=OBJECTIVES[objective],
        step=step,
        bound=bound,
        forget=forget,
        read=read,
        chunk=chunk,
        checkpoint=checkpoint,
    )
    check_products(precision, q.device, v.dtype)
    if validate:
        check_finite(q=q, k=k, v=v, **{f"weights[{i}]": weight for i, weight in enumerate(weights)})
        _check_gates(lr, decay, momentum, step)

    def run(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> tuple[Tensor, State]:
        return _run(q, k, v, weights, settings, precision, **given)

    if cu_seqlens is not None:
        return run_unpacked(run, q, k, v, cu_seqlens, **arguments)
    return run(q, k, v, **arguments)


def _check_gates(lr: float | Tensor, decay: float | Tensor | None, momentum: float | Tensor | None, step: str) -> None:
    normalized = step != "raw"
    check_range("lr", lr, 0.0, 1.0 if normalized else float("inf"), closed="[]" if normalized else "[)")
    if decay is not None:
        check_range("decay", decay, 0.0, 1.0)
    if momentum is not None:
        check_range("momentum", momentum, 0.0, 1.0, closed="[)")


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Sequence[Tensor],
    settings: Settings,
    precision: Precision,
    *,
    lr: float | Tensor,
    decay: float | Tensor | None,
    momentum: float | Tensor | None,
    mask: Tensor | None,
    state: Mapping[str, Any] | None,
) -> tuple[Tensor, State]:
    dtype = torch.promote_types(v.dtype, torch.float32)
    gates = {
        name: per_token(name, value, q, dtype)
        for name, value in (("lr", lr), ("decay", decay), ("momentum", momentum))
        if value is not None
    }
    given = TokenBatch.of(q, k, v, mask, *gates.values())
    lengths = given.active.shape
    fresh = {"k": given.k, "v": given.v, "live": given.active}
    fresh = idle(fresh | {name: gate.expand(lengths) for name, gate in gates.items()})
    with no_autocast(q.device), products_in(precision):
        now, pending = _begun(weights, fresh, settings, "momentum" in gates, state)
        y, now, rest = scan_rows(now, given.q, pending, fresh, settings, mask)
    return given.answer(y), {**named(now), "pending": rest}


def _begun(
    weights: Sequence[Tensor],
    fresh: Mapping[str, Tensor],
    settings: Settings,
    has_momentum: bool,
    state: Mapping[str, Any] | None,
) -> tuple[WeightState, Mapping[str, Tensor] | None]:
    """Return the memory and the tokens since its chunk began: from `state`, or else from `weights`."""
    k, v = fresh["k"], fresh["v"]
    check_weights(weights, k, v, settings.form)
    shapes = [(*k.shape[:2], *weight.shape[-2:]) for weight in weights]
    if state is None:
        begun = [weight.to(k.dtype).expand(shape) for weight, shape in zip(weights, shapes, strict=True)]
        return (begun, [torch.zeros_like(w) for w in begun] if has_momentum else None), None
    wanted = {"weights", "pending", *(["momentum"] if has_momentum else [])}
    if set(state) != wanted:
        raise ValueError(
            f"state has the keys {sorted(state)}; with these gates it must have {sorted(wanted)}. Is it the state of "
            "another memory?"
        )
    check_pending(state["pending"], fresh, settings.chunk)
    begun = kept(state, "weights", shapes, k.dtype)
    return (begun, kept(state, "momentum", shapes, k.dtype) if has_momentum else None), state["pending"]


def kept(state: Mapping[str, Any], kind: str, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    """W1, …, W_L of one kind in a state."""
    found = []
    for i, shape in enumerate(shapes, start=1):
        weight = state[kind].get(f"W{i}")
        if weight is None or weight.shape != shape:
            have = "missing" if weight is None else f"{list(weight.shape)}"
            raise ValueError(
                f"state[{kind!r}]['W{i}'] is {have}; for these weights and tokens it must be {list(shape)}. Is it "
                "the state of another batch or another memory?"
            )
        found.append(weight.to(dtype))
    return found


def check_pending(pending: Mapping[str, Tensor], fresh: Mapping[str, Tensor], chunk: int) -> None:
    """Raise ValueError unless `pending` tokens are of the kind of the `fresh` ones, and fewer than a chunk."""
    if set(pending) - {COUNT} != set(fresh):
        raise ValueError(
            f"state['pending'] has {sorted(pending)}; with these gates it must have {sorted(fresh)}. Is it the state "
            "of another memory?"
        )
    count = pending["k"].shape[2]
    for name, x in fresh.items():
        shape = [*x.shape[:2], count, *x.shape[3:]]
        if list(pending[name].shape) != shape:
            raise ValueError(
                f"state['pending'][{name!r}] is {list(pending[name].shape)}; for these tokens it must be {shape}. Is "
                "it the state of another batch or another memory?"
            )
    if count >= chunk:
        raise ValueError(
            f"state['pending'] has {count} tokens of a chunk that is not over; with chunk={chunk} it has at most "
            f"{chunk - 1}. Is it the state of a memory with longer chunks?"
        )


def check_weights(weights: Sequence[Tensor], k: Tensor, v: Tensor, form: mlp.Form, name: str = "weights") -> None:
    """Raise ValueError unless `weights`, the argument `name`, fit each other and k, v `[B, H, T, D]`."""
    if not weights:
        raise ValueError(f"{name} are empty; give W1, or W1, …, W_L with the outermost first")
    batch, heads, into, out = k.shape[0], k.shape[1], k.shape[-1], v.shape[-1]
    leading = ((), (heads,), (batch, heads))
    sizes = [out, *(weight.shape[-2] for weight in weights[1:]), into]
    for i, weight in enumerate(weights):
        shape = (sizes[i], sizes[i + 1])
        if weight.ndim < 2 or tuple(weight.shape[:-2]) not in leading or weight.shape[-2:] != shape:
            raise ValueError(
                f"{name}[{i}] has the shape {list(weight.shape)}; for keys of width {into}, values of width {out} and "
                f"the weights beside it, it must be {list(shape)}, with or without the heads ({heads}), or the batch "
                f"and the heads ({batch}, {heads}), before it"
            )
    if form.residual and into != out:
        raise ValueError(f"residual=True needs keys and values of one width, not {into} and {out}; give residual=False")


def named(now: WeightState) -> State:
    """Return a memory as it stands in a state."""
    names: State = {"weights": {f"W{i}": w for i, w in enumerate(now[0], start=1)}}
    if now[1] is not None:
        names["momentum"] = {f"W{i}": s for i, s in enumerate(now[1], start=1)}
    return names
