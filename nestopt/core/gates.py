"""Numbers that come from the data: finding the gates of a level, and putting values in their place."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor

from nestopt.core.device import constants
from nestopt.core.part import FieldError, Gate, Heads, Part
from nestopt.core.schedule import is_scheduled, resolved, schedules_in

P = TypeVar("P", bound=Part)


def gates_of(part: Part, prefix: str = "") -> dict[str, Gate]:
    """Every gate in `part` and in the parts within it, by dotted path (`"rule.beta"`)."""
    found = {prefix + name: value for name in part.field_names if isinstance(value := getattr(part, name), Gate)}
    for name, inner in part.parts():
        found |= gates_of(inner, f"{prefix}{name}.")
    return found


def per_head(gates: Mapping[str, Gate], like: Tensor) -> dict[str, Tensor]:
    """Return the constants per head among `gates` by dotted path, `[B, H, T]` for tokens like `like` `[B, H, T, D]`."""
    return {
        path: constants(gate.values(like.shape[1]), like)[:, None].expand(like.shape[:3])
        for path, gate in gates.items()
        if isinstance(gate, Heads)
    }


def idle_gate(gate: Gate, like: Tensor) -> Tensor:
    """Return a gate at its initial value, for tokens like `like` `[B, H, T, D_k]`: `[B, H, T]`, or with its width."""
    width = gate.width(like.shape[-1])
    return like.new_full((*like.shape[:3], *(() if width is None else (width,))), gate.init)


def bind(part: P, values: Mapping[str, Tensor] | None = None, step: int | Tensor | None = 1) -> P:
    """Return a copy of `part` whose gates are numbers: those of `values` by dotted path, each other gate its `init`.

    Schedules are the numbers of `step`; None leaves them. A part without either is returned as it is.
    """
    numbers: dict[str, Any] = {path: (values or {}).get(path, gate.init) for path, gate in gates_of(part).items()}
    if part.is_scheduled and step is not None:
        numbers |= scheduled_numbers(part, step)
    return with_values(part, numbers) if numbers else part


def schedules_of(part: Part, prefix: str = "") -> dict[str, Any]:
    """Return the fields of `part` and of the parts within it that have schedules, by dotted path."""
    if not part.is_scheduled:
        return {}
    found = {prefix + key: value for key in part.field_names if is_scheduled(value := getattr(part, key))}
    for name, inner in part.parts():
        found |= schedules_of(inner, f"{prefix}{name}.")
    return found


def with_schedules(part: P, values: Mapping[str, Any]) -> P:
    """Return a copy of `part` with schedules in these fields, by dotted path."""
    made = with_values(part, values)
    _mark(made)
    return made


def _mark(part: Part) -> bool:
    inner = [_mark(own) for _, own in part.parts()]
    found = any(inner) or any(is_scheduled(getattr(part, key)) for key in part.field_names)
    if found and not part.is_scheduled:
        part.is_scheduled = True  # type: ignore[misc]
        part._attributes = (*part._attributes, "is_scheduled")  # type: ignore[misc]
    return found


def refuse_schedules(part: Part) -> None:
    """Raise FieldError for a schedule in what runs on tokens."""
    for path, value in schedules_of(part).items():
        problem = "is not allowed on tokens: an optimizer's steps drive schedules; give a number, or a Gate"
        raise FieldError(part.label, path, value, problem)


def scheduled_numbers(part: Part, step: int | Tensor) -> dict[str, Any]:
    """Return the numbers at a step of all fields that have schedules, by dotted path.

    Raises FieldError where a schedule that is a function gives one that the part does not allow.
    """
    found = {path: resolved(value, lambda own: own.at(step)) for path, value in schedules_of(part).items()}
    if isinstance(step, int):
        _check_functions(part, found)
    return found


def _check_functions(part: Part, found: Mapping[str, Any], prefix: str = "") -> None:
    own = {key: value for key in part.field_names if is_scheduled(value := getattr(part, key))}
    if any(schedule.function is not None for value in own.values() for schedule in schedules_in(value)):
        dataclasses.replace(part, **{key: found[prefix + key] for key in own})  # type: ignore[type-var]
    for name, inner in part.parts():
        if inner.is_scheduled:
            _check_functions(inner, found, f"{prefix}{name}.")


def with_values(part: P, values: Mapping[str, Any]) -> P:
    """Return a copy of `part` with these fields, by dotted path, which are not checked."""
    # not dataclasses.replace: what was valid stays valid, and tensors have no value to check; not copy.copy, which
    # torch 2.11 does not compile
    bound = object.__new__(type(part))
    for name in part._attributes:
        setattr(bound, name, getattr(part, name))
    inner: dict[str, dict[str, Any]] = {}
    for path, value in values.items():
        head, _, rest = path.partition(".")
        if rest:
            inner.setdefault(head, {})[rest] = value
        else:
            setattr(bound, head, value)
    for name, below in inner.items():
        child = getattr(part, name)
        if isinstance(child, Part):
            setattr(bound, name, with_values(child, below))
        else:
            split: dict[str, dict[str, Any]] = {}
            for path, value in below.items():
                key, _, rest = path.partition(".")
                split.setdefault(key, {})[rest] = value
            items = {key: with_values(item, split[key]) if key in split else item for key, item in child.items()}
            setattr(bound, name, items)
    return bound
