"""Any level on tokens, by its fast exact form where it has one, else by the generic machine."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Literal

from torch import Tensor

from nestopt.core.associative import AssociativeMemory, Gd
from nestopt.core.gates import gates_of
from nestopt.core.level import Level
from nestopt.core.memories import Matrix, Window
from nestopt.core.objectives import Dot
from nestopt.core.outputs import Plain
from nestopt.core.part import Gate, Number, nearest
from nestopt.core.retentions import Decay, Keep
from nestopt.core.tokens import begin, scan
from nestopt.core.tree import State
from nestopt.levels.momentum import Momentum
from nestopt.ops.attention import attention
from nestopt.ops.linear_attention import linear_attention
from nestopt.ops.shapes import check_gate, check_tokens

logger = logging.getLogger("nestopt")

_MEANING = ("attend", "begin", "gradient", "write", "_answer", "_rules", "_appends")


def fast_form(level: Level) -> Literal["attention", "linear_attention"] | None:
    """Which fast form `run` takes for `level`, by its name in `nestopt.ops`; None is the generic machine.

    Only where it is exact. `attention`: a `window` memory read after its write, with a plain output.
    `linear_attention`: a `matrix` memory with the `dot` objective, the rule `gd`, retention `keep` or `decay` and a
    plain output; and `momentum` without Nesterov. All with `period=1`, `chunk=1`, and no gates within the features.
    """
    if type(level) is Momentum:
        plain = not level.nesterov and not level.undamped_start and level.period == 1
        return "linear_attention" if plain and _is_number(level.beta) and _is_number(level.dampening) else None
    if not isinstance(level, AssociativeMemory):
        return None
    if any(getattr(type(level), name) is not getattr(AssociativeMemory, name) for name in _MEANING):
        return None  # a subclass that means something else
    if level.period > 1 or level.chunk > 1 or type(level.output) is not Plain or gates_of(level.features):
        return None
    if type(level.memory) is Window:
        return "attention" if level.read == "after" else None
    linear = (
        type(level.memory) is Matrix
        and type(level.objective) is Dot
        and type(level.rule) is Gd
        and level.rule.period == 1
        and type(level.retention) in (Keep, Decay)
        and _is_number(getattr(level.retention, "keep", 1.0))
    )
    return "linear_attention" if linear and _is_number(level.lr) and _is_number(level.step_size) else None


def run(
    level: Level,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    gates: Mapping[str, Tensor] | None = None,
    state: State | None = None,
    learned: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, State]:
    """Run `level` over tokens: `nestopt.core.scan` with the same arguments, results and states, fast where it can be.

    A sequence may be begun by one and gone on with by the other. A level without a fast form is logged once.

    Args:
        level: any level; its gates that are not in `gates` take their initial value.
        q, k: `[B, T, H, D_k]`, T >= 1.
        v: `[B, T, H, D_v]`.
        gates: values of the level's gates by dotted path, `[B, T, H]` each.
        state: from a former call, to go on from there; None starts anew (from `learned`).
        learned: the start a layer learned, `[H, ...]` by name.

    Returns:
        y `[B, T, H, D_v]` and the state.

    Raises:
        ValueError: for shapes that do not fit, no tokens, or a gate that the level does not have.
    """
    check_tokens(q, k, v)
    gates = dict(gates or {})
    known = gates_of(level)
    for path, gate in gates.items():
        if path not in known:
            raise ValueError(
                f"{level.label} has no gate {path!r}.{nearest(path, known)} "
                f"It has: {', '.join(sorted(known)) or 'none'}."
            )
        check_gate(f"gate {path!r}", gate, q)
    form = fast_form(level)
    if form is None:
        _say_slow(repr(level))
        return scan(level, q, k, v, gates=gates, state=state, learned=learned)
    state = begin(level, q, v, learned) if state is None else state
    if isinstance(level, Momentum):
        y, new = _momentum(level, q, k, v, gates, state["level"])
    elif form == "attention":
        y, new = _attention(level, q, k, v, state["level"])  # type: ignore[arg-type]
    else:
        y, new = _linear_attention(level, q, k, v, gates, state["level"])  # type: ignore[arg-type]
    return y, {"step": state["step"] + q.shape[1], "level": new}


def _momentum(
    level: Momentum, q: Tensor, k: Tensor, v: Tensor, gates: Mapping[str, Tensor], state: State
) -> tuple[Tensor, State]:
    taken = 1 - _value(level.dampening, gates.get("dampening"))
    decay = _value(level.beta, gates.get("beta"))
    y, m = linear_attention(q, k, _scaled(v, taken), decay=_per_head(decay, q), state=state["momentum"])
    return y, {"momentum": m}


def _linear_attention(
    level: AssociativeMemory, q: Tensor, k: Tensor, v: Tensor, gates: Mapping[str, Tensor], state: State
) -> tuple[Tensor, State]:
    strength = _value(level.lr, gates.get("lr")) * _value(level.step_size, gates.get("step_size"))
    decay = None
    if isinstance(level.retention, Decay):
        decay = _per_head(_value(level.retention.keep, gates.get("retention.keep")), q)
    y, m = linear_attention(
        level.features(q),
        level.features(k),
        _scaled(v, strength),
        decay=decay,
        state=state["memory"]["m"],
        read="after" if level.read == "after" else "before",  # a chunk of one token begins before its write
    )
    return y, {**state, "memory": {"m": m}}


def _attention(level: AssociativeMemory, q: Tensor, k: Tensor, v: Tensor, state: State) -> tuple[Tensor, State]:
    size = level.memory.size  # type: ignore[attr-defined]
    y, pairs = attention(level.features(q), level.features(k), v, window=size, state=state["memory"])
    return y, {**state, "memory": pairs}


def _is_number(value: Number) -> bool:
    return not isinstance(value, Tensor) or value.ndim == 0


def _value(number: Number, gate: Tensor | None) -> float | Tensor:
    if isinstance(number, Gate):
        return number.init if gate is None else gate
    return number


def _scaled(v: Tensor, strength: float | Tensor) -> Tensor:
    """Values times one number, or a number `[B, T, H]` per token and head."""
    if isinstance(strength, Tensor):
        return v * strength if strength.ndim == 0 else v * strength[..., None]
    return v if strength == 1.0 else v * strength


def _per_head(decay: float | Tensor, q: Tensor) -> float | Tensor:
    return decay.expand(q.shape[2]) if isinstance(decay, Tensor) and decay.ndim == 0 else decay


@functools.cache
def _say_slow(description: str) -> None:
    logger.info("%s has no fast form on tokens: the generic machine runs it token by token, which is slow", description)
