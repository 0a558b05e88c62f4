"""`key=value` overrides of plain data: what comes after a config file on a command line."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from nestopt.config.errors import ConfigError, join, show
from nestopt.config.schema import Config
from nestopt.config.section import Section
from nestopt.config.sizes import named
from nestopt.config.spec import field_default, field_hints, kind_of, kind_of_items, to_spec
from nestopt.config.values import DEPTH
from nestopt.core import Part, UnknownName, registry
from nestopt.core.part import is_subclass

Key = str | int
Complete = Callable[[Any], Any]

_PATH = re.compile(r"(\[\d+\]|[^.\[\]\s]+)(\[\d+\]|\.[^.\[\]\s]+)*")
_STEP = re.compile(r"\[(\d+)\]|[^.\[\]]+")

_KINDS = {"stack": "level", "mixer": "level", "mlp": "level", "rest": "level", "dataset": "dataset", "task": "task"}
_KINDS["decay_shape"] = "schedule"
"""The keys of the schema that hold parts. (What holds parts within a part, its class says.)"""

_ITEMS = {"mixers": "level", "mlps": "level", "callbacks": "callback", "loggers": "logger"}
"""Those that hold lists of them."""

_REST = ("stack", "lr")
"""Keys of the section `rest` even where that is written as a bare level, whose other keys are the level's."""


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where in the data: its keys, and the kind of part that belongs there, or that its items are."""

    keys: tuple[Key, ...] = ()
    kind: str | None = None
    items: str | None = None

    def __str__(self) -> str:
        return join("", *self.keys) or "the root"

    def at(self, key: Key, kind: str | None = None, items: str | None = None) -> _Place:
        return _Place((*self.keys, key), kind, items)


def apply(data: Any, overrides: Iterable[str], complete: Complete | None = None) -> Any:
    """Return `data` with the `overrides`, such as `optimizer.stack[0].period=4`, in order; `data` is not changed.

    Values are YAML. A key takes the place of one that would stand in its own (`model.mixer` of `model.mixers`), unless
    both are overridden. A part that is written as a bare name becomes a mapping where a key of it is set
    (`optimizer.stack.beta=0.5` on `stack: momentum`), and a list of levels a chain; a part that is not written at all
    starts from its default. Keys may be new.

    Args:
        data: a configuration, or the spec of a level.
        overrides: `KEY=VALUE` each.
        complete: gives a configuration with its defaults written out, for overrides that reach into one.

    Raises:
        ConfigError: for an override that is not `KEY=VALUE`, or a place that can't be there.
    """
    if isinstance(overrides, str):
        overrides = [overrides]
    data, done = copy.deepcopy(data), set[str]()
    for override in overrides:
        keys, value = _split(override)
        bare = not isinstance(data, dict) or "level" in data
        root = _Place(kind="level" if bare else None)
        # lazily, and of the data as they are by now: few overrides reach into a default
        data = _put(data, root, keys, value, None if bare or complete is None else partial(complete, data))
        done.add(here := join("", *keys))
        for name, section, key, other, nothing in rivals(data):
            ours, theirs = f"{name}.{key}", f"{name}.{other}"
            if here == ours and theirs not in done:
                section.pop(other, None)
            elif here == theirs and value != nothing and ours not in done:
                section.pop(key, None)
    return data


def rivals(data: Any) -> Iterator[tuple[str, dict[str, Any], str, str, Any]]:
    """Yield of a configuration the name of a section, the section, a key, another that stands in its place, and this
    one's value where it does not.
    """
    for name, field in Config.model_fields.items() if isinstance(data, dict) else ():
        if isinstance(section := data.get(name), dict) and is_subclass(cls := field.annotation, Section):
            yield from ((name, section, key, other, nothing) for key, (other, nothing) in cls.rivals.items())


def _split(override: str) -> tuple[list[Key], Any]:
    name, equals, text = override.partition("=")
    name = name.strip()
    if not equals or not name:
        raise ConfigError.refuse("", override, "an override is KEY=VALUE, such as optimizer.lr=0.01")
    if not _PATH.fullmatch(name):
        raise ConfigError.refuse("", override, f"{name!r} is not a key; write it like optimizer.stack[0].period")
    if name.count(".") + name.count("[") > DEPTH:
        raise ConfigError.refuse("", override, f"it leads more than {DEPTH} deep")
    keys: list[Key] = [int(step[1]) if step[1] else step[0] for step in _STEP.finditer(name)]
    from nestopt.config.io import parse

    try:
        return keys, parse(text)
    except ConfigError as error:
        raise ConfigError.refuse("", override, f"{text!r} is not YAML ({error})") from None


def _put(value: Any, place: _Place, keys: list[Key], new: Any, complete: Callable[[], Any] | None) -> Any:
    """Return `value`, which stands at `place`, with `new` at the `keys` below it."""
    if not keys:
        return new
    key, *rest = keys
    value = _open(value, place, key)
    if isinstance(key, int):
        if place.kind == "level" and isinstance(value, dict) and "levels" in value:
            return _put(value, place, ["levels", *keys], new, complete)
        if not isinstance(value, list):
            raise ConfigError.refuse(join("", *place.keys, key), new, f"{place} is {show(value)}, not a list")
        if key >= len(value):
            there = f"there are {len(value)}, counted from 0"
            raise ConfigError.refuse(join("", *place.keys, key), new, f"{place} has no such item; {there}")
        value[key] = _put(value[key], place.at(key, place.kind or place.items), rest, new, complete)
        return value
    if not isinstance(value, dict):
        raise ConfigError.refuse(join("", *place.keys, key), new, f"{place} is {show(value)}, which has no keys")
    cls = _class(value, place)
    inner = _below(place, key, cls)
    below = value.get(key)
    if rest and below is None:
        below = _default(inner, cls, complete)
    value[key] = _put(below, inner, rest, new, complete)
    return value


def _open(value: Any, place: _Place, key: Key) -> Any:
    """Return `value` in the form that has keys, where it is written in a shorter one."""
    if place.keys[-1:] == ("rest",) and place.kind and key in _REST:
        section = isinstance(value, dict) and "level" not in value
        return value if section else {"stack": value}
    if isinstance(key, int):
        return value
    if place.keys == ("model",) and isinstance(value, str):
        return named(value)
    if place.kind and isinstance(value, str):
        return {place.kind: value}
    if place.kind == "level" and isinstance(value, list):
        return {"level": "chain", "levels": value}
    return value


def _class(value: dict[str, Any], place: _Place) -> type[Part] | None:
    """Return the class of the part that the mapping `value` describes."""
    name = value.get(place.kind) if place.kind else None
    try:
        return registry.get(place.kind, name) if place.kind and isinstance(name, str) else None
    except UnknownName:
        return None  # an override may mend it yet; else building it says so


def _below(place: _Place, key: str, cls: type[Part] | None) -> _Place:
    if cls is not None:
        hint = field_hints(cls).get(key)
        return place.at(key, kind_of(hint), kind_of_items(hint))
    return place.at(key, place.items or _KINDS.get(key), _ITEMS.get(key))


def _default(place: _Place, cls: type[Part] | None, complete: Callable[[], Any] | None) -> Any:
    """Return what stands at `place` where nothing is written."""
    if cls is not None:
        default = field_default(cls, str(place.keys[-1])) if place.keys[-1] in field_hints(cls) else None
        return to_spec(default) if isinstance(default, Part) else {}
    # of a section, only what is given is written, so that it can be told from defaults
    found = complete() if complete and len(place.keys) > 1 else {}
    for key in place.keys:
        try:
            found = found[key]
        except (KeyError, IndexError, TypeError):
            return {}
    return {} if found is None else found
