"""Parts (levels and what they are made of) from plain data, and back.

A spec is a name (`momentum`), a mapping that says what it is and its fields
(`{level: momentum, beta: 0.9, period: 16}`), or, for levels, a list: a chain of them.
"""

from __future__ import annotations

import dataclasses
import functools
import numbers
import re
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints, overload

from torch import Tensor

from nestopt.config.errors import ConfigError, join, show
from nestopt.config.values import check_size, convert, number, schedules
from nestopt.core import (
    Channels,
    Features,
    Gate,
    Heads,
    Level,
    Memory,
    Objective,
    Output,
    Part,
    Retention,
    UnknownName,
    chain,
    registry,
)
from nestopt.core.part import FieldError, is_subclass, read_by
from nestopt.core.registry import KINDS, base_of
from nestopt.core.schedule import Schedule

Spec = str | dict[str, Any]
"""A part as plain data: a name, or a mapping with the part's kind as first key."""


_SAVED: ContextVar[bool] = ContextVar("saved", default=False)


@contextmanager
def as_saved() -> Iterator[None]:
    """Write and read the specs of saved runs, which mean the same when defaults have changed.

    The first of a part's `former_defaults` is always written, and where it is missing they are what was left out.
    """
    token = _SAVED.set(True)
    try:
        yield
    finally:
        _SAVED.reset(token)


# -- from plain data -------------------------------------------------------------------------------------------------


_L = TypeVar("_L", bound=Level)


@overload
def build(kind: Literal["level"], spec: _L | type[_L], path: str = "") -> _L: ...
@overload
def build(kind: Literal["level"], spec: object, path: str = "") -> Level: ...
@overload
def build(kind: Literal["memory"], spec: object, path: str = "") -> Memory: ...
@overload
def build(kind: Literal["objective"], spec: object, path: str = "") -> Objective: ...
@overload
def build(kind: Literal["retention"], spec: object, path: str = "") -> Retention: ...
@overload
def build(kind: Literal["features"], spec: object, path: str = "") -> Features: ...
@overload
def build(kind: Literal["output"], spec: object, path: str = "") -> Output: ...
@overload
def build(kind: str, spec: object, path: str = "") -> Part: ...
def build(kind: str, spec: object, path: str = "") -> Part:
    """Build the part that `spec` describes.

    Args:
        kind: `level`, `memory`, `objective`, `retention`, `features`, `output` or `dataset`.
        spec: a part of that kind (returned as it is), a class of such parts, a name, a mapping
            `{level: momentum, beta: 0.9}` (its first key is the kind), or for levels a list, which is a chain.
        path: where `spec` stands in a larger configuration, for messages.

    Raises:
        ConfigError: for an unknown name or key, or a value that the part does not allow.

    >>> from nestopt.config import build
    >>> build("level", {"level": "momentum", "beta": 0.5, "period": 16})
    Momentum(period=16, beta=0.5, dampening=0.0, nesterov=False, undamped_start=False)
    """
    base = base_of(kind)
    if not path:
        check_size(spec)
    if isinstance(spec, Part):
        if isinstance(spec, base):
            return spec
        raise ConfigError.refuse(path, spec, f"it is a {spec.kind}; give a {kind}")
    if isinstance(spec, str | type):
        return _make(_class(kind, spec, path), {}, path)
    if isinstance(spec, Mapping):
        return _from_mapping(kind, spec, path)
    if kind == "level" and isinstance(spec, list | tuple):
        if not spec:
            raise ConfigError.refuse(path, spec, "give one level or more")
        return chain([build("level", item, join(path, i)) for i, item in enumerate(spec)])
    raise ConfigError.refuse(path, spec, _how(kind))


def _how(kind: str) -> str:
    also = ", or a list of levels" if kind == "level" else ""
    return f"a {kind} is written as a name, or {{{kind}: NAME, ...}} with its fields{also}"


def _class(kind: str, name: object, path: str) -> type[Part]:
    base = base_of(kind)
    if isinstance(name, type):
        if is_subclass(name, base):
            return name
        raise ConfigError.refuse(path, name, f"give a subclass of {base.__name__}")
    if not isinstance(name, str):
        raise ConfigError.refuse(path, name, f"give the name of a {kind}, such as {registry.names(kind)[0]}")
    try:
        return registry.get(kind, name)
    except UnknownName as error:
        raise ConfigError.refuse(path, name, str(error)) from None


def _from_mapping(kind: str, spec: Mapping[Any, Any], path: str) -> Part:
    if kind not in spec:
        raise ConfigError.refuse(path, dict(spec), f"the key {kind!r} is missing: {_how(kind)}")
    cls = _class(kind, spec[kind], join(path, kind))
    hints = field_hints(cls)
    fields = {}
    for key, value in spec.items():
        if key == kind:
            continue
        if key not in hints:
            raise ConfigError.unknown_key(path, key, value, _label(cls), hints)
        fields[key] = _field(hints[key], value, join(path, key))
    return _make(cls, fields, path)


def _make(cls: type[Part], fields: dict[str, Any], path: str) -> Part:
    missing = [
        field.name
        for field in dataclasses.fields(cls)  # type: ignore[arg-type]
        if field.init and field.name not in fields and field_default(cls, field.name) is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{_label(cls)} needs {' and '.join(repr(name) for name in missing)}; give a value", path)
    former = cls.former_defaults
    if _SAVED.get() and former and next(iter(former)) not in fields:
        hints = field_hints(cls)
        fields = {key: _field(hints[key], value, join(path, key)) for key, value in former.items()} | fields
    try:
        return cls(**fields)
    except FieldError as error:
        raise ConfigError(
            f"{show(error.value)} {_as_yaml(error.problem)}", join(path, error.key), error.value
        ) from error
    except (ValueError, TypeError) as error:
        raise ConfigError(_as_yaml(str(error)), path, fields) from error


def _as_yaml(text: str) -> str:
    """Return what a level says to those who write Python as those who write YAML would have it."""
    return re.sub(r"\bNone\b", "null", text)


def _field(hint: Any, value: object, path: str) -> Any:
    """Return `value` as a field with this type hint."""
    if (scheduled := schedules(value, path)) is not None:
        return scheduled
    whole, (hint, optional) = hint, _without_none(hint)
    if value is None and optional:
        return None
    if (kind := kind_of(hint)) is not None:
        return build(kind, value, path)
    if Gate in (hint, *get_args(hint)):
        return number(value, path)
    if (kind := kind_of_items(hint)) is None:
        return convert(whole, value, path)
    if isinstance(value, Mapping) and get_origin(hint) is dict:
        _check_names(value, path)
        return {name: build(kind, item, join(path, name)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        if get_origin(hint) is not dict:
            return get_origin(hint)(build(kind, item, join(path, i)) for i, item in enumerate(value))
        if kind == "level" and value:
            return chain([build("level", item, join(path, i)) for i, item in enumerate(value)]).levels  # named by it
    raise ConfigError.refuse(path, value, f"give a list or a mapping of one {kind} or more")


read_by(_field)


def _check_names(value: Mapping[Any, Any], path: str) -> None:
    for name in value:
        if not isinstance(name, str):
            raise ConfigError.refuse(path, name, "names must be text; write it in quotes, or give another name")


# -- type hints ------------------------------------------------------------------------------------------------------


@functools.cache
def field_hints(cls: type[Part]) -> dict[str, Any]:
    """Return the fields that a spec of `cls` may give, with their types."""
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]


def field_default(cls: type[Part], name: str) -> Any:
    """Return what a field is where nothing is given; `dataclasses.MISSING` where something must be."""
    field = next(field for field in dataclasses.fields(cls) if field.name == name)  # type: ignore[arg-type]
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def kind_of(hint: Any) -> str | None:
    """Return the kind of part that a field with this type holds, or None."""
    hint, _ = _without_none(hint)
    hint = get_args(hint)[0] if get_origin(hint) is Annotated else hint
    return hint.kind if is_subclass(hint, Part) and hint.kind in KINDS else None


def kind_of_items(hint: Any) -> str | None:
    """Return the kind of part that a dict, list or tuple of parts holds, or None."""
    args = [arg for arg in get_args(hint) if arg is not ...]
    return kind_of(args[-1]) if args and get_origin(hint) in (dict, list, tuple) else None


def _without_none(hint: Any) -> tuple[Any, bool]:
    if get_origin(hint) in (Union, types.UnionType) and types.NoneType in get_args(hint):
        rest = tuple(arg for arg in get_args(hint) if arg is not types.NoneType)
        return Union[rest], True  # noqa: UP007  # built at run time
    return hint, False


def _label(cls: type[Part]) -> str:
    return registry.name_of(cls) or cls.__name__


# -- to plain data ---------------------------------------------------------------------------------------------------


def to_spec(part: Part) -> Spec:
    """Write `part` as plain data, which `build` reads: its name, or a mapping with what differs from defaults.

    Raises:
        ConfigError: where the class of a part is not registered, or a field holds what plain data can't (a tensor).

    >>> from nestopt.config import to_spec
    >>> from nestopt.levels import momentum
    >>> to_spec(momentum()), to_spec(momentum(0.5))
    ('momentum', {'level': 'momentum', 'beta': 0.5})
    """
    return _to_spec(part, "")


def _to_spec(part: Part, path: str) -> Spec:
    cls = type(part)
    name = registry.name_of(cls)
    if name is None:
        _, hook = KINDS[part.kind]
        raise ConfigError(
            f"{cls.__module__}.{cls.__qualname__} has no name, so it can't be written; register it by the hook {hook}",
            path,
            part,
        )
    spec: dict[str, Any] = {part.kind: name}
    marker = [*cls.former_defaults][:1]
    for key in field_hints(cls):
        value, default = getattr(part, key), field_default(cls, key)
        if isinstance(value, Tensor) or value != default or (_SAVED.get() and key in marker):
            spec[key] = _plain(value, join(path, key))
    return name if len(spec) == 1 else spec


def _plain(value: Any, path: str) -> Any:
    if isinstance(value, Part):
        return _to_spec(value, path)
    if isinstance(value, Schedule):
        if value.function is not None:
            raise ConfigError(
                f"{value!r} is a function, which can't be written as plain data; give points", path, value
            )
        points = {str(step): number for step, number in value.points}  # as JSON has its keys
        return {"schedule": points if value.shape == "linear" else {"points": points, "shape": value.shape}}
    if isinstance(value, Heads):
        return {"heads": value.init if value.ratio == 0.5 else {"init": value.init, "ratio": value.ratio}}
    if isinstance(value, Gate):
        kind = "channels" if isinstance(value, Channels) else "gate"
        if (value.low, value.high) == (0.0, 1.0):
            return {kind: value.init}
        return {kind: {"init": value.init, "low": value.low, "high": value.high}}
    if value is None or isinstance(value, bool):
        return value
    plain: tuple[tuple[type, Any], ...] = ((str, str), (numbers.Integral, int), (numbers.Real, float))
    for abstract, exact in plain:
        if isinstance(value, abstract):
            return exact(value)  # NumPy's numbers become Python's
    if isinstance(value, list | tuple):
        return [_plain(item, join(path, i)) for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        if value and all(isinstance(item, Level) for item in value.values()):
            unnamed = chain(list(value.values())).levels
            if list(unnamed) == list(value):
                return [_plain(item, join(path, i)) for i, item in enumerate(value.values())]
        return {str(key): _plain(item, join(path, key)) for key, item in value.items()}
    raise ConfigError(
        f"{show(value)} can't be written as plain data; give a number, text, a list or a part", path, value
    )
