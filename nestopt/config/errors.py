"""The one error of configurations: where in them, what was given, and what is allowed."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from nestopt.core.part import nearest


class _Repr(reprlib.Repr):
    """As Python writes a value, but for nothing, which those who write YAML call null."""

    def repr_NoneType(self, value: None, level: int) -> str:
        return "null"


_short = _Repr()
_short.maxstring = _short.maxother = 80
_short.maxdict = _short.maxlist = 8
_short.maxlevel = 4  # deeper, what is shown would multiply


class ConfigError(ValueError):
    """A configuration that can't be.

    Attributes:
        path: the key, such as `optimizer.stack[1].beta`; "" is the root. Of the first problem, where there are more.
        value: what was given there.
        problem: what is wrong with it and what is allowed.
        source: the file it came from, or "".
        errors: each problem as a ConfigError of its own; `[self]` where there is one.

    As text: one line per problem, `optimizer.stack[1].beta: 1.5 is not allowed; give a number in [0, 1]`.
    """

    def __init__(
        self,
        problem: str,
        path: str = "",
        value: object = None,
        source: str = "",
        errors: Sequence[ConfigError] = (),
    ) -> None:
        super().__init__(problem, path, value, source, tuple(errors))
        self.problem, self.path, self.value, self.source = problem, path, value, source
        self.errors: list[ConfigError] = list(errors) or [self]

    @classmethod
    def of(cls, errors: Sequence[ConfigError], source: str = "") -> ConfigError:
        """Return one error that lists `errors`."""
        first = errors[0]
        if len(errors) == 1:
            return cls(first.problem, first.path, first.value, source or first.source)
        return cls(first.problem, first.path, first.value, source, errors)

    @classmethod
    def refuse(cls, path: str, value: object, allowed: str) -> ConfigError:
        """Return `path: value is not allowed; allowed`."""
        return cls(f"{show(value)} is not allowed; {allowed}", path, value)

    @classmethod
    def unknown_key(cls, path: str, key: object, value: object, owner: str, allowed: Iterable[str]) -> ConfigError:
        """Refuse a key that `owner`, at `path`, does not have."""
        allowed = sorted(allowed)
        hint = nearest(str(key), allowed)
        return cls.refuse(
            join(path, key), value, f"{owner} has no key {str(key)!r}.{hint} Its keys: {', '.join(allowed)}"
        )

    def said_in(self, source: Callable[[ConfigError], str]) -> ConfigError:
        """Return this error with the source of each problem that has none."""
        found = [ConfigError(e.problem, e.path, e.value, e.source or source(e)) for e in self.errors]
        sources = {e.source for e in found}
        if len(sources) > 1:
            return ConfigError.of(found)
        return ConfigError.of([ConfigError(e.problem, e.path, e.value) for e in found], sources.pop())

    def under(self, path: str, source: str = "") -> ConfigError:
        """Return this error for a configuration that stands at `path` of a larger one."""
        return ConfigError.of([ConfigError(e.problem, join(path, e.path), e.value) for e in self.errors], source)

    def __str__(self) -> str:
        lines = [": ".join(filter(None, [e.source if e is not self else "", e.path, e.problem])) for e in self.errors]
        if not self.source:
            return "\n".join(lines)
        return "\n  ".join([f"{self.source}:", *lines]) if len(lines) > 1 else f"{self.source}: {lines[0]}"


def show(value: object) -> str:
    """Return `value` for a message: its repr, cut where it is long."""
    try:
        return _short.repr(value)
    except ValueError:  # Python writes no number of more than 4,300 digits
        return "a number that is too long to show"


def join(path: str, *keys: object) -> str:
    """Return the path of a key (or, an int, of an item) under `path`."""
    for key in keys:
        if isinstance(key, int) and not isinstance(key, bool):
            path += f"[{key}]"
        elif key != "":
            path += str(key) if not path or str(key).startswith("[") else f".{key}"
    return path


def translate(details: Iterable[Any], path: str, value: object) -> ConfigError:
    """Translate pydantic's findings (`ValidationError.errors()`) on `value`, which stands at `path`."""
    found: dict[str, ConfigError] = {}
    for item in details:
        where = _walk(item["loc"], value)
        cause = item.get("ctx", {}).get("error")
        if isinstance(cause, ConfigError):
            for inner in cause.under(join(path, *where)).errors:
                found.setdefault(inner.path, inner)
        else:
            at = join(path, *where)
            allowed = _allowed(item["type"], item.get("ctx", {}), item["msg"], item["input"])
            if at in found:  # the branches of a union
                allowed = f"{found[at].problem.partition('; ')[2]}; or {allowed}"
            found[at] = ConfigError.refuse(at, item["input"], allowed)
    return ConfigError.of(list(found.values()))


def _walk(loc: tuple[int | str, ...], value: Any) -> list[int | str]:
    """Return the steps of `loc` that are keys or indices in `value`; the others are pydantic's names for branches."""
    where: list[int | str] = []
    for step in loc:
        inside = (
            step in value
            if isinstance(value, Mapping)
            else isinstance(value, list | tuple) and isinstance(step, int) and step < len(value)
        )
        if inside:
            where.append(step)
            value = value[step]
    return where


_WORDS = {
    "bool_type": "give true or false",
    "bool_parsing": "give true or false",
    "dict_type": "give a mapping",
    "finite_number": "give a finite number",
    "float_parsing": "give a number",
    "float_type": "give a number",
    "int_from_float": "give a whole number",
    "int_parsing": "give a whole number",
    "int_type": "give a whole number",
    "list_type": "give a list",
    "model_type": "give a mapping of its keys",
    "none_required": "give null",
    "string_type": "give text",
    "tuple_type": "give a list",
}


def _allowed(kind: str, context: Mapping[str, Any], message: str, given: object) -> str:
    """Return what is allowed where pydantic found an error of type `kind`."""
    if kind in _WORDS:
        return _WORDS[kind]
    if kind == "value_error":
        return str(context["error"])
    if kind == "literal_error":
        hint = nearest(given, re.findall(r"'([^']*)'", context["expected"])) if isinstance(given, str) else ""
        return f"give {context['expected']}{'.' + hint if hint else ''}"
    if kind.startswith(("greater_than", "less_than")):
        (given,) = context.values()
        bound = f"{given:g}" if isinstance(given, float) else given
        return {
            "greater_than": f"give more than {bound}",
            "greater_than_equal": f"give {bound} or more",
            "less_than": f"give less than {bound}",
            "less_than_equal": f"give {bound} or less",
        }[kind]
    return message[:1].lower() + message[1:]
