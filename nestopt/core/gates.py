"""Numbers that come from the data: finding the gates of a level, and putting values in their place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor

from nestopt.core.device import constants
from nestopt.core.part import Gate, Heads, Part

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


def bind(part: P, values: Mapping[str, Tensor] | None = None) -> P:
    """Return a copy of `part` whose gates are numbers: those of `values` by dotted path, each other gate its `init`.

    A part without gates is returned as it is.
    """
    gates = gates_of(part)
    numbers = {path: (values or {}).get(path, gate.init) for path, gate in gates.items()}
    return with_values(part, numbers) if gates else part


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
