"""Self-modifying Titans on tokens: memories that make the keys, values and gates that all of them are written with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from nestopt.core.device import no_autocast
from nestopt.core.objectives import L2
from nestopt.core.part import nearest
from nestopt.core.precision import Precision, check_products, products_in
from nestopt.core.token_batch import TokenBatch, check_finite, check_range, check_whole, per_token, run_unpacked
from nestopt.core.tree import State
from nestopt.levels.deep import mlp
from nestopt.levels.deep.deep_memory import check_pending, check_weights, kept, named
from nestopt.levels.deep.mlp import Settings
from nestopt.levels.deep.scan import WeightState, idle, scan_rows
from nestopt.levels.self_modifying.projections import SOURCES, ProjectionMemories, Readout, project


def self_modifying(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    starts: Mapping[str, Sequence[Tensor]],
    readout: Mapping[str, tuple[Tensor, Tensor]],
    momentum: float | Tensor | None = None,
    delta: float = 1.0,
    step: Literal["normalized", "raw"] = "normalized",
    bound: float = 1.0,
    eta_max: float = 1.0,
    activation: str = "silu",
    norm: bool = False,
    chunk: int = 16,
    projection_chunk: int = 64,
    state: Mapping[str, Any] | None = None,
    checkpoint: int = 0,
    mask: Tensor | None = None,
    cu_seqlens: Any = None,
    precision: Precision = "float32",
    validate: bool = False,
) -> tuple[Tensor, State]:
    r"""Memories that learn what they are to learn, and how fast; one set for every sequence and head (NL eq. 83-91).

    With $M(x; W) = x + W_1\sigma(W_2 \dots\sigma(W_L x))$, one memory each for k, v, q, η, α and the answers,

    $$k_t = \frac{M_k(k)}{\lVert\cdot\rVert},\quad v_t = M_v(v),\quad q_t = \frac{M_q(q)}{\lVert\cdot\rVert},\quad
      \eta_t = \sigma(w_\eta\cdot M_\eta(k) + b_\eta),\quad \alpha_t = \sigma(w_\alpha\cdot M_\alpha(k) + b_\alpha)$$

    $$\hat v = M(v_t), \qquad S_t = \theta_t S_{t-1} + \eta_t \nabla_W\tfrac12\lVert M(k_t) - \hat v\rVert^2, \qquad
      W_t = \alpha_t W_{t-1} - \delta\eta_t (W_{t-1}a_t)a_t^\top - S_t$$

    for each of them, and $y_t = M_{\mathrm{memory}}(q_t)$. All reads, values and gradients are of the weights that the
    present chunk began with (eq. 90); `chunk=projection_chunk=1` is the exact recurrence. A value is a constant to the
    inner gradient, not to the outer.

    The memories that make keys, values and gates do not depend on the answering one. So they run over all tokens first,
    as one memory with as many heads more; the last is `deep_memory` with values of its own.

    Args:
        q, k, v: `[B, T, H, D]`, T >= 1: what the memories are shown. Those of η and α are shown k.
        starts: weights at the start by memory: of `"memory"`, and of those of `"k"`, `"v"`, `"q"`, `"eta"`, `"alpha"`
            that are to learn, each W1, …, W_L as of `deep_memory`; those that make something must be of one size. For
            one that is left out, M(x) = x.
        readout: w and b of `"eta"` and `"alpha"`: w `[D]`, `[H, D]` or `[B, H, D]`, b `[]`, `[H]` or `[B, H]`.
        momentum: θ in [0, 1): a number, `[H]` or `[B, T, H]`; None is none, and there is no state for it.
        delta: δ, 0 for none and 1 for delta gradient descent, by each layer's own input.
        step: `"normalized"`: η = η̃ · bound · α (1 - θ) / (ε + n) with η̃ the gate (`nestopt.levels.deep.step_size`), and
            values that are bounded (`bounded` there), so that memories do not diverge. `"raw"`: η as
            above times `eta_max`, the letter of the equations.
        bound: of a chunk's whole step along any direction, in (0, 2); also 2 where memories have one weight each.
        eta_max: of the raw step.
        activation: σ, one of silu, gelu, relu, tanh, identity.
        norm: whether what W1 gives is divided by its root mean square.
        chunk: tokens between new weights of the answering memory.
        projection_chunk: likewise of the others. One of the two must divide the other.
        state: from a former call with the same settings; `starts` are then not looked at, but for their shapes.
        checkpoint: recompute in the backward pass all but every so many chunks' weights; 0 keeps all.
        mask: `[B, T]`, True for tokens. Padding, wherever it is, takes no place in a chunk, is answered with 0, and
            neither writes nor fades.
        cu_seqlens: for sequences end to end in one row, q `[1, N, H, D]`: where each begins, and the end.
        precision: of the products (`nestopt.core.precision`): `"float32"`, `"tf32"` or `"bfloat16"`.
        validate: check that all numbers are finite and the momentum in its range, and wait for the device to say so.

    Returns:
        y `[B, T, H, D]` in the dtype of v, and the state: `"memory"`, and by name in `"projections"` the others, each
        with `"weights"` and perhaps `"momentum"` (`[B, H, out, in]`, float32, or float64 if v is) at the start of its
        chunk that is not over; and of either kind of chunk the tokens so far, as they were made, in its `"pending"`,
        with their `"count"` `[B]` where rows differ in it.

    A token that is not finite is not written, and only its own answer is NaN.

    Raises:
        ValueError: for shapes that do not fit, an option that is not allowed, a state of another memory, or a
            `precision` that the device lacks; with `validate`, for numbers out of range or not finite.
    """
    if bound == 2 and any(len(weights) > 1 for weights in starts.values()):
        raise ValueError(f"bound={bound!r} is not allowed; give a number above 0 and below 2")
    settings = Settings(
        form=mlp.Form(activation, residual=True, norm=norm),
        delta=float(delta),
        objective=L2(),
        step=step,
        bound=bound,
        read="chunk",
        chunk=chunk,
        checkpoint=checkpoint,
        own_values=True,
    )
    check_products(precision, q.device, v.dtype)
    check_whole("projection_chunk", projection_chunk, 1)
    if max(chunk, projection_chunk) % min(chunk, projection_chunk):
        raise ValueError(
            f"projection_chunk={projection_chunk} is not allowed with chunk={chunk}: one of them must divide the other"
        )
    if not eta_max > 0:
        raise ValueError(f"eta_max={eta_max!r} is not allowed; give a number above 0")
    _check_names(starts, readout)
    if validate:
        flat = {f"starts[{name!r}][{i}]": w for name, ws in starts.items() for i, w in enumerate(ws)}
        check_finite(q=q, k=k, v=v, **flat)
        if momentum is not None:
            check_range("momentum", momentum, 0.0, 1.0, closed="[)")
    names = tuple(name for name in SOURCES if name in starts)
    maker = ProjectionMemories(names, readout, dataclasses.replace(settings, chunk=projection_chunk), eta_max)

    def run(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> tuple[Tensor, State]:
        return _run(q, k, v, starts, maker, settings, precision, **given)

    arguments = {"momentum": momentum, "mask": mask, "state": state}
    if cu_seqlens is not None:
        return run_unpacked(run, q, k, v, cu_seqlens, **arguments)
    return run(q, k, v, **arguments)


def _check_names(starts: Mapping[str, Any], readout: Mapping[str, Any]) -> None:
    known = ("memory", *SOURCES)
    for name in starts:
        if name not in known:
            raise ValueError(f"starts has {name!r}, which is no memory; there are {known}.{nearest(name, known)}")
    if "memory" not in starts:
        raise ValueError(f"starts has {sorted(starts)}; 'memory', which answers, must be there")
    if set(readout) != {"eta", "alpha"}:
        raise ValueError(f"readout has {sorted(readout)}; it must have w and b of 'alpha' and 'eta'")


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Mapping[str, Sequence[Tensor]],
    maker: ProjectionMemories,
    settings: Settings,
    precision: Precision,
    *,
    momentum: float | Tensor | None,
    mask: Tensor | None,
    state: Mapping[str, Any] | None,
) -> tuple[Tensor, State]:
    dtype = torch.promote_types(v.dtype, torch.float32)
    theta = None if momentum is None else per_token("momentum", momentum, q, dtype)
    given = TokenBatch.of(q, k, v, mask, *([] if theta is None else [theta]))
    _check_shapes(starts, maker.readout, given)
    if state is None:
        state = _begun(starts, given, theta is not None)
    else:
        _check_state(state, starts, maker, given, theta is not None, settings)
    with no_autocast(q.device), products_in(precision):
        y, new = scan_boxes(given, theta, state, maker, settings)
    return given.answer(y), new


def scan_boxes(
    given: TokenBatch, theta: Tensor | None, state: Mapping[str, Any], maker: ProjectionMemories, settings: Settings
) -> tuple[Tensor, State]:
    """y `[B, H, T, D]` and the state after these tokens, of momenta `theta` `[B, H, T]`."""
    live = given.active
    shown = {"q": given.q, "k": given.k, "v": given.v, "live": live}
    if theta is not None:
        shown["momentum"] = given.gate(theta, 1.0).expand(live.shape)
    boxes = {name: now_of(state["projections"][name], given.dtype) for name in maker.names}
    before = state["projections"]["pending"] if maker.names else None
    made, boxes, rest = project(boxes, shown, _held(before), maker, given.mask)
    queries = made.pop("q")
    memory = now_of(state["memory"], given.dtype)
    y, memory, left = scan_rows(memory, queries, _held(state["memory"]["pending"]), made, settings, given.mask)
    projections: State = {name: named(box) for name, box in boxes.items()}
    if rest is not None:
        projections["pending"] = rest
    return y, {"memory": {**named(memory), "pending": left}, "projections": projections}


def now_of(box: Mapping[str, Any], dtype: torch.dtype) -> WeightState:
    """Return a memory of a state as the kernels take it."""
    weights = [weight.to(dtype) for weight in box["weights"].values()]
    return weights, [momentum.to(dtype) for momentum in box["momentum"].values()] if "momentum" in box else None


def _held(pending: Mapping[str, Tensor] | None) -> State | None:
    """Return the tokens of a state, some of which may not be live any more; None where there are none."""
    return None if pending is None or not pending["k"].shape[2] else idle(pending)


def _begun(starts: Mapping[str, Sequence[Tensor]], given: TokenBatch, has_momentum: bool) -> State:
    """Return the state before the first token."""
    batch, heads, _, dim = given.k.shape

    def box(weights: Sequence[Tensor]) -> State:
        begun = [weight.to(given.dtype).expand(batch, heads, *weight.shape[-2:]) for weight in weights]
        return named((begun, [torch.zeros_like(w) for w in begun] if has_momentum else None))

    gates = ("lr", "decay", *(["momentum"] if has_momentum else []))
    none: State = {name: given.k.new_zeros(batch, heads, 0, dim) for name in ("k", "v")}
    none["live"] = given.active[:, :, :0]
    none |= {name: given.k.new_zeros(batch, heads, 0) for name in gates}
    projections: State = {name: box(weights) for name, weights in starts.items() if name != "memory"}
    if projections:
        projections["pending"] = none
    return {"memory": {**box(starts["memory"]), "pending": none}, "projections": projections}


# -- refusals ----------------------------------------------------------------------------------------------------------


def _check_shapes(starts: Mapping[str, Sequence[Tensor]], readout: Readout, given: TokenBatch) -> None:
    k, v = given.k, given.v
    if k.shape != v.shape:
        raise ValueError(f"v is {v.shape[-1]} wide and k {k.shape[-1]}; here they must be the same")
    first = next((name for name in SOURCES if name in starts), None)
    for name, weights in starts.items():
        check_weights(weights, k, v, mlp.Form(), f"starts[{name!r}]")
        if name != "memory" and first is not None:
            own, wanted = ([tuple(w.shape[-2:]) for w in starts[key]] for key in (name, first))
            if own != wanted:
                raise ValueError(
                    f"starts[{name!r}] has weights {own} and starts[{first!r}] {wanted}; memories that make something "
                    "must be of one size"
                )
    batch, heads, _, dim = k.shape
    for name, parts in readout.items():
        for part, x, tail in zip("wb", parts, ((dim,), ()), strict=True):
            allowed = [(*lead, *tail) for lead in ((), (heads,), (batch, heads))]
            if tuple(x.shape) not in allowed:
                raise ValueError(
                    f"readout[{name!r}]: {part} has the shape {list(x.shape)}; for these tokens it must be one of "
                    f"{', '.join(str(list(shape)) for shape in allowed)}"
                )


def _check_state(
    state: Mapping[str, Any],
    starts: Mapping[str, Sequence[Tensor]],
    maker: ProjectionMemories,
    given: TokenBatch,
    has_momentum: bool,
    settings: Settings,
) -> None:
    wanted = {"weights", *(["momentum"] if has_momentum else [])}
    parts = {"memory": (state.get("memory", {}), {*wanted, "pending"})}
    projections = state.get("projections", {})
    parts["projections"] = (projections, {*maker.names, *(["pending"] if maker.names else [])})
    parts |= {f"projections.{name}": (projections.get(name, {}), wanted) for name in maker.names}
    for name, (part, keys) in parts.items():
        if set(part) != keys:
            raise ValueError(
                f"the state's {name} has the keys {sorted(part)}; with these arguments it must have {sorted(keys)}. Is "
                "it the state of another memory?"
            )
    batch, heads = given.active.shape[:2]
    for name, weights in starts.items():
        box = state["memory"] if name == "memory" else projections[name]
        shapes = [(batch, heads, *weight.shape[-2:]) for weight in weights]
        for kind in wanted:
            kept(box, kind, shapes, given.dtype)
    fresh = {"k": given.k, "v": given.v, "live": given.active, "lr": given.active, "decay": given.active}
    fresh |= {"momentum": given.active} if has_momentum else {}
    check_pending(state["memory"]["pending"], fresh, settings.chunk)
    if maker.names:
        check_pending(projections["pending"], fresh, maker.settings.chunk)
