"""Plain values, as YAML or a command line gives them, made what a type hint asks for.

Kind where nothing is lost (`"1e-3"`, which YAML reads as text, is a number), strict where something would be: true is
not 1, and 1.5 is not a whole number.
"""

from __future__ import annotations

import functools
import os
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    AllowInfNan,
    BeforeValidator,
    ConfigDict,
    Field,
    PydanticUserError,
    Strict,
    TypeAdapter,
    ValidationError,
)
from torch import Tensor

from nestopt.config.errors import ConfigError, join, translate
from nestopt.core import Channels, Gate, Heads, Number
from nestopt.core.schedule import Schedule


def no_bool(allowed: str) -> BeforeValidator:
    """Refuse true and false, which Python takes for 1 and 0, saying what is `allowed`."""

    def refuse(value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError(allowed)
        return value

    return BeforeValidator(refuse)


Bool = Annotated[bool, Strict()]
Whole = Annotated[int, no_bool("give a whole number"), Field(le=2**63 - 1)]
Real = Annotated[float, no_bool("give a number")]
Finite = Annotated[float, AllowInfNan(False), no_bool("give a number")]


def _can_be_path(value: str) -> str:
    """Refuse what no file system takes."""
    if not value:
        raise ValueError("give a path")
    if "\0" in value:
        raise ValueError("give a path without NUL")
    if len(os.fsencode(value)) > 4095 or any(len(os.fsencode(part)) > 255 for part in Path(value).parts):
        raise ValueError("give a path of at most 4,095 bytes, 255 in each of its parts")
    return value


FilePath = Annotated[str, AfterValidator(_can_be_path)]

DEPTH, ITEMS = 40, 100_000
"""How deep plain data may be nested, and how many items they may have."""

_LEAVES: dict[Any, Any] = {bool: Bool, int: Whole, float: Real}


def careful(hint: Any) -> Any:
    """Return `hint` with every bool, int, float and fixed tuple in it validated as this module says."""
    if hint in _LEAVES:
        return _LEAVES[hint]
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        given = ", ".join(repr(arg) for arg in args)
        return hint if any(isinstance(arg, bool) for arg in args) else Annotated[hint, no_bool(f"give one of {given}")]
    if origin is None:
        return hint
    if origin is Annotated:
        return Annotated[(careful(args[0]), *args[1:])]
    if not args or isinstance(args[0], list):
        return hint
    inner = tuple(arg if arg is ... else careful(arg) for arg in args)
    if origin in (Union, types.UnionType):
        return Union[inner]  # noqa: UP007  # built at run time
    if origin is tuple and ... not in args:
        return Annotated[(tuple[inner], BeforeValidator(functools.partial(_of_length, len(args))))]  # type: ignore[valid-type]
    return origin[inner]


def _of_length(count: int, value: Any) -> Any:
    if isinstance(value, list | tuple) and len(value) != count:
        raise ValueError(f"give a list of {count}")
    return value


def _adapter(hint: Any) -> TypeAdapter[Any]:
    hint = careful(hint)
    try:
        return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    except PydanticUserError:  # the type brings a configuration of its own
        return TypeAdapter(hint)


def check_size(data: object) -> None:
    """Raise ConfigError for data that are nested without end, or have more items than a configuration could mean.

    An item counts as often as it is there: YAML's aliases make many of few.
    """
    waiting, seen = [(data, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        seen += 1
        if depth > DEPTH:
            raise ConfigError(f"nested more than {DEPTH} deep")  # without the data, which nobody could write out
        if seen > ITEMS:
            raise ConfigError(f"more than {ITEMS:,} items")
        if isinstance(value, Mapping):
            waiting += ((item, depth + 1) for item in value.values())
        elif isinstance(value, list | tuple):
            waiting += ((item, depth + 1) for item in value)


def convert(hint: Any, value: object, path: str) -> Any:
    """Return `value` as the type `hint`. Raises ConfigError at `path`, or at the item of it that is wrong."""
    try:
        return _adapter(hint).validate_python(value)
    except ValidationError as error:
        raise translate(error.errors(include_url=False), path, value) from None


def number(value: object, path: str) -> Number:
    """Read a constant, a tensor, a `Gate`, or one written as `{gate: 0.9}` or `{gate: {init: 0.5, low: 0, high: 2}}`.

    A constant per head is `{heads: 0.97}` or `{heads: {init: 0.97, ratio: 0.5}}`; a gate for each channel of the keys
    is written with `channels` for `gate`.
    """
    if isinstance(value, Gate | Tensor):
        return value
    if not isinstance(value, Mapping):
        try:
            return convert(float, value, path)
        except ConfigError:
            raise ConfigError.refuse(
                path, value, "give a number, or {gate: NUMBER} for one that the data choose"
            ) from None
    for key in value:
        if key not in _GATES:
            raise ConfigError.unknown_key(path, key, value[key], "a number that the data or the head choose", _GATES)
    if len(value) != 1:
        raise ConfigError.refuse(path, dict(value), "give a number, or {gate: NUMBER} for one that the data choose")
    (key, spec), *_ = value.items()
    return _gate(key, spec, join(path, key))


def schedules(value: object, path: str) -> Any:
    """Read a number that steps drive, or a list with one among its numbers; None for anything else.

    Written `{schedule: {0: 0.9, 1000: 0.99}}`, or `{schedule: {points: {0: 0.9, 1000: 0.99}, shape: cosine}}`.
    """
    if isinstance(value, Schedule):
        return value
    if isinstance(value, list | tuple):
        found = [schedules(item, join(path, i)) for i, item in enumerate(value)]
        if all(item is None for item in found):
            return None
        pairs = enumerate(zip(found, value, strict=True))
        return tuple(convert(float, item, join(path, i)) if made is None else made for i, (made, item) in pairs)
    if not isinstance(value, Mapping) or "schedule" not in value:
        return None
    if len(value) != 1:
        raise ConfigError.refuse(
            path, dict(value), "give a number, or {schedule: {STEP: NUMBER, ...}} and nothing else"
        )
    spec, path = value["schedule"], join(path, "schedule")
    if isinstance(spec, Mapping) and "points" in spec:
        for key in spec:
            if key not in ("points", "shape"):
                raise ConfigError.unknown_key(path, key, spec[key], "a schedule", ("points", "shape"))
        points, shape = spec["points"], spec.get("shape")
    else:
        points, shape = spec, None
    if isinstance(points, Mapping):
        points = {step: convert(float, number, join(path, step)) for step, number in points.items()}
    try:
        return Schedule(points, shape)
    except ValueError as error:
        raise ConfigError(str(error), path, spec) from None


_GATES: dict[str, tuple[type[Gate], tuple[str, ...]]] = {
    "gate": (Gate, ("init", "low", "high")),
    "channels": (Channels, ("init", "low", "high")),
    "heads": (Heads, ("init", "ratio")),
}


def _gate(kind: str, spec: object, path: str) -> Gate:
    cls, allowed = _GATES[kind]
    if not isinstance(spec, Mapping):
        spec, keys = {"init": spec}, {"init": path}
    else:
        keys = {key: join(path, key) for key in allowed}
        for key in spec:
            if key not in keys:
                raise ConfigError.unknown_key(path, key, spec[key], f"a number by {kind}", keys)
        if "init" not in spec:
            raise ConfigError.refuse(path, dict(spec), "give init, the value that it starts at")
    numbers = {key: convert(float, value, keys[key]) for key, value in spec.items()}
    try:
        return cls(**numbers)
    except ValueError as error:
        raise ConfigError(str(error), keys["init"], spec["init"]) from None
