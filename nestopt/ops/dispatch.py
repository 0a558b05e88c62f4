"""Any level on tokens, by its closed form where it has one, else by the generic machine."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nestopt.core.associative import AssociativeMemory
from nestopt.core.device import no_autocast
from nestopt.core.gates import gates_of, per_head
from nestopt.core.level import Level
from nestopt.core.memories import Memory
from nestopt.core.part import Gate, Number, nearest
from nestopt.core.precision import Precision, check_products, current, products_in
from nestopt.core.retentions import Decay
from nestopt.core.token_batch import check_finite, packed, tokens
from nestopt.core.token_checks import check_gate, check_tokens
from nestopt.core.token_reference import begin, scan
from nestopt.core.tree import State
from nestopt.levels.attention.softmax import attention
from nestopt.levels.deep.form import deep_form
from nestopt.levels.forms import fast_form, rule_of
from nestopt.levels.gradient.momentum import Momentum
from nestopt.levels.matrix.delta_rule import delta_rule
from nestopt.levels.matrix.level import Omega
from nestopt.levels.matrix.linear_attention import linear_attention
from nestopt.levels.matrix.oja import oja
from nestopt.levels.matrix.omega import omega
from nestopt.levels.self_modifying.form import self_form
from nestopt.levels.self_modifying.level import SelfModifying
from nestopt.ops.recall import recall

logger = logging.getLogger("nestopt")


def run(
    level: Level,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    gates: Mapping[str, Tensor] | None = None,
    state: State | None = None,
    learned: Mapping[str, Tensor] | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Any = None,
    checkpoint: int = 0,
    learn: bool = True,
    precision: Precision = "float32",
    validate: bool = False,
) -> tuple[Tensor, State]:
    """Run `level` over tokens: `nestopt.core.scan` with the same results and states, fast where it can be.

    A sequence may be begun by one and gone on with by the other. A level without a closed form is logged once.

    Args:
        level: any level; its gates that are not in `gates` take their initial value.
        q, k: `[B, T, H, D_k]`, T >= 1.
        v: `[B, T, H, D_v]`.
        gates: values of the level's gates by dotted path, `[B, T, H]` each.
        state: from a former call, to go on from there; None starts anew (from `learned`).
        learned: the start a layer learned, `[H, ...]` by name.
        mask: `[B, T]`, True for tokens, False for padding, which changes nothing but takes its place in a chunk.
        cu_seqlens: for sequences end to end in one row, `[1, N, H, D]`: where each begins, and the end.
        checkpoint: of deep memories: recompute in the backward pass all but every so many chunks' weights.
        learn: False reads only: each token is answered from the memory that `state` holds (`nestopt.core.recall`), as
            if it came next, whatever else is in this call, and `state` is given back as it is.
        precision: of the memory's products (`nestopt.core.precision`): `"float32"`, `"tf32"` or `"bfloat16"`.
        validate: check that all numbers are finite, at the cost of waiting for the device.

    A token that holds a number that is not finite is not written; its own answer is NaN, and nobody else's. (Attention
    that reads `"before"` its write keeps a pair of zeros in its place.)

    Returns:
        y `[B, T, H, D_v]` in the dtype of v, and the state, which is float32 at least.

    Raises:
        ValueError: for shapes that do not fit, no tokens, a gate that the level does not have, padding for a memory
            that keeps every pair and reads before it, or a `precision` that the device lacks; with `validate`, for a
            number that is not finite.
    """
    check_tokens(q, k, v)
    check_products(precision, q.device, v.dtype)
    known, gates = gates_of(level), dict(gates or {})
    for path, gate in gates.items():
        if path not in known:
            raise ValueError(
                f"{level.label} has no gate {path!r}.{nearest(path, known)} "
                f"It has: {', '.join(sorted(known)) or 'none'}."
            )
        check_gate(f"gate {path!r}", gate, q)
    if validate:
        check_finite(q=q, k=k, v=v, **{f"gate {path!r}": gate for path, gate in gates.items()})
    if cu_seqlens is not None:
        options: dict[str, Any] = {"checkpoint": checkpoint, "learn": learn, "precision": precision}
        return _run_packed(level, q, k, v, cu_seqlens, gates, state, learned, options)
    dtype = torch.promote_types(v.dtype, torch.float32)
    gates = {path: gate.to(dtype) for path, gate in {**per_head(level, v.to(dtype)), **gates}.items()}
    if state is None:
        state = begin(level, q, v[:, :0].to(dtype), {name: x.to(dtype) for name, x in (learned or {}).items()})
    form = fast_form(level)
    with no_autocast(q.device), products_in(precision):
        if not learn:
            return recall(level, q, k, v, gates, state, mask), state
        if form is None:
            _say_slow(repr(level))
            return _generic(level, q, k, v, gates, state, mask)
        if form == "deep_memory":
            assert isinstance(level, AssociativeMemory)
            return deep_form(level, q, k, v, gates, state, mask, checkpoint)
        if form == "self_modifying":
            assert isinstance(level, SelfModifying)
            return self_form(level, q, k, v, gates, state, mask, checkpoint)
        y, new = _FORMS[form](level, q, k, v, gates, state["level"], mask)
        count = q.shape[1] if mask is None else mask.sum(-1)[:, None]
        return y, {"step": state["step"] + count, "level": new}


def _run_packed(
    level: Level,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Any,
    gates: dict[str, Tensor],
    state: State | None,
    learned: Mapping[str, Tensor] | None,
    options: dict[str, Any],
) -> tuple[Tensor, State]:
    def one(
        q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor, state: State | None, **cut: Tensor
    ) -> tuple[Tensor, State]:
        return run(level, q, k, v, gates=cut, state=state, learned=learned, mask=mask, **options)

    return packed(one, q, k, v, cu_seqlens, state=state, **gates)


def _generic(
    level: Level, q: Tensor, k: Tensor, v: Tensor, gates: dict[str, Tensor], state: State, mask: Tensor | None
) -> tuple[Tensor, State]:
    if mask is not None and isinstance(level, AssociativeMemory) and type(level.memory).append is not Memory.append:
        raise ValueError(
            f"mask and cu_seqlens are not for {level.label} with read={level.read!r}, whose memory would keep padding; "
            'give read="after", or run sequences of one length together'
        )
    given = tokens(q, k, v, mask, *(gate.transpose(1, 2) for gate in gates.values()))
    live, known = given.live.transpose(1, 2), gates_of(level)
    gates = {path: torch.where(live, gate, known[path].init) for path, gate in gates.items()}
    q, k, v = (x.transpose(1, 2) for x in (given.q, given.k, given.v))
    y, new = scan(level, q, k, v, gates=gates, state=state, live=live)
    return given.answer(y.transpose(1, 2)), new


# -- the closed forms of matrix memories and windows: their states are those of the generic machine --------------------


def _linear_attention(
    level: Level, q: Tensor, k: Tensor, v: Tensor, gates: Mapping[str, Tensor], state: State, mask: Tensor | None
) -> tuple[Tensor, State]:
    if isinstance(level, Momentum):
        taken = 1 - value_of(level.dampening, gates.get("dampening"))
        decay = value_of(level.beta, gates.get("beta"))
        y, m = linear_attention(
            q, k, _scaled(v, taken), decay=decay, state=state["momentum"], mask=mask, precision=current()
        )
        return y, {"momentum": m}
    assert isinstance(level, AssociativeMemory)
    y, m = linear_attention(
        level.features(q),
        level.features(k),
        _scaled(v, _strength(level, gates)),
        decay=_decay(level, gates),
        state=state["memory"]["m"],
        read="after" if level.read == "after" else "before",  # a chunk of one token begins before its write
        mask=mask,
        precision=current(),
    )
    return y, {**state, "memory": {"m": m}}


def _delta_rule(
    level: Level, q: Tensor, k: Tensor, v: Tensor, gates: Mapping[str, Tensor], state: State, mask: Tensor | None
) -> tuple[Tensor, State]:
    assert isinstance(level, AssociativeMemory)
    q, k = level.features(q), level.features(k)
    decay, lr, theta = _decay(level, gates), _strength(level, gates), _momentum(level, gates)
    dtype = torch.promote_types(v.dtype, torch.float32)
    if level.normalized:
        damping = (1.0 if decay is None else decay) * (1.0 if theta is None else 1 - theta)
        lr = level.bound * lr * damping / (1e-4 + k.to(dtype).square().sum(-1))
    before: Any = state["memory"]["m"]
    if theta is not None:
        before = {"memory": before, "momentum": -state["rule"]["m"]["momentum"]}
    y, after = delta_rule(
        q,
        k,
        v,
        lr=lr,
        decay=decay,
        momentum=theta,
        state=before,
        decay_first=level.fade == "before",
        read="after" if level.read == "after" else "before",
        mask=mask,
        precision=current(),
    )
    if theta is None:
        return y, {**state, "memory": {"m": after}}
    # here momentum is what is added to the memory; the generic machine's is what is taken off
    return y, {"memory": {"m": after["memory"]}, "rule": {"m": {"momentum": -after["momentum"]}}}


def _oja(
    level: Level, q: Tensor, k: Tensor, v: Tensor, gates: Mapping[str, Tensor], state: State, mask: Tensor | None
) -> tuple[Tensor, State]:
    assert isinstance(level, AssociativeMemory)
    y, m = oja(
        level.features(q),
        level.features(k),
        v,
        lr=_strength(level, gates),
        decay=_decay(level, gates),
        state=state["memory"]["m"],
        mask=mask,
        precision=current(),
    )
    return y, {**state, "memory": {"m": m}}


def _omega(
    level: Level, q: Tensor, k: Tensor, v: Tensor, gates: Mapping[str, Tensor], state: State, mask: Tensor | None
) -> tuple[Tensor, State]:
    assert isinstance(level, Omega)
    pairs = state["window"]
    y, new = omega(
        level.features(q),
        level.features(k),
        v,
        lr=_strength(level, gates),
        window=level.window,
        weights=level.weight,
        decay=_decay(level, gates),
        # places that no token has taken yet hold keys of zeros, which write nothing
        state={"memory": state["memory"]["m"], "keys": pairs["keys"], "values": pairs["values"]},
        mask=mask,
        precision=current(),
    )
    seen = torch.ones(v.shape[:2], dtype=torch.bool, device=v.device) if mask is None else mask
    counted = pairs["counts"].sum(-1) + seen.sum(-1)[:, None]
    places = torch.arange(level.window - 1, 0, -1, device=v.device)
    window = {
        "keys": new["keys"],
        "values": new["values"],
        "counts": (counted[..., None] >= places).to(pairs["counts"]),
    }
    return y, {**state, "memory": {"m": new["memory"]}, "window": window}


def _attention(
    level: Level, q: Tensor, k: Tensor, v: Tensor, gates: Mapping[str, Tensor], state: State, mask: Tensor | None
) -> tuple[Tensor, State]:
    assert isinstance(level, AssociativeMemory)
    size = level.memory.size  # type: ignore[attr-defined]
    q, k = level.features(q), level.features(k)
    y, pairs = attention(q, k, v, window=size, state=state["memory"], mask=mask, precision=current())
    return y, {**state, "memory": pairs}


_FORMS = {
    "attention": _attention,
    "linear_attention": _linear_attention,
    "delta_rule": _delta_rule,
    "oja": _oja,
    "omega": _omega,
}


def _strength(level: AssociativeMemory, gates: Mapping[str, Tensor]) -> float | Tensor:
    return value_of(level.lr, gates.get("lr")) * value_of(level.step_size, gates.get("step_size"))


def _decay(level: AssociativeMemory, gates: Mapping[str, Tensor]) -> float | Tensor | None:
    if not isinstance(level.retention, Decay):
        return None
    return value_of(level.retention.keep, gates.get("retention.keep"))


def _momentum(level: AssociativeMemory, gates: Mapping[str, Tensor]) -> float | Tensor | None:
    rule = rule_of(level.rule)
    if rule is None or rule.momentum is None:
        return None
    return value_of(rule.momentum, gates.get(f"rule.{rule.inside}beta"))


def value_of(number: Number, gate: Tensor | None) -> float | Tensor:
    """What a field of a level is at these tokens: the gate's values, or the constant."""
    if isinstance(number, Gate):
        return number.init if gate is None else gate
    return number


def _scaled(v: Tensor, strength: float | Tensor) -> Tensor:
    """Values times one number, or a number `[B, T, H]` per token and head."""
    if isinstance(strength, Tensor):
        return v * strength if strength.ndim == 0 else v * strength[..., None]
    return v if strength == 1.0 else v * strength


@functools.cache
def _say_slow(description: str) -> None:
    logger.info("%s has no closed form on tokens: the generic machine runs it, which is slow", description)


__all__ = ["fast_form", "run"]
