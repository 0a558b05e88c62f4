"""What levels that hold another level, or have modes, share."""

from __future__ import annotations

import dataclasses
import warnings

import torch
from torch import Tensor

from nestopt.core.clock import start
from nestopt.core.level import Level
from nestopt.core.order import Node
from nestopt.core.part import FieldError, Part
from nestopt.core.signal import Signal
from nestopt.core.tree import leaves

LIMIT = 3.0
"""Of an entry that is divided by the root of its own second moment: what was 0 for long would come out as 1/√(1-β2)."""


def nodes_within(level: Level, name: str, period: int, after: tuple[str, ...]) -> list[Node]:
    """Return the memories of a level inside another; none for one that remembers nothing."""
    remembers = any(leaves(start(level, torch.zeros(2, 2))))
    return level.nodes(name, period, after) if remembers else []


def nodes_of_momentum(level: Level, P: Level, name: str, period: int, after: tuple[str, ...]) -> list[Node]:
    """Return the memories of a `level` that sums what `P` makes of gradients: those of P, and then its own."""
    every = period * level.period
    inner = nodes_within(P, f"{name}.P", every, after)
    own = f"{name}.momentum" if inner else name
    needs = tuple(node.name for node in inner) or after
    return [*inner, Node(own, every, needs, "vector", level.objectives["momentum"], level.label)]


def refuse_unused(part: Part, keys: tuple[str, ...], where: str) -> None:
    """Raise FieldError for fields that were given although they have no effect: those `keys` not at their default."""
    defaults = {field.name: field.default for field in dataclasses.fields(part)}  # type: ignore[arg-type]
    for key in keys:
        if (value := getattr(part, key)) != defaults[key]:
            raise FieldError(part.label, key, value, f"has no effect with {where}; leave it out")


def check_whole(part: Part, *keys: str) -> None:
    """Raise FieldError for fields that are not whole numbers of 1 or more."""
    for key in keys:
        value = getattr(part, key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise FieldError(part.label, key, value, "is not allowed; give a whole number, 1 or more")


def param_of(level: Level, signal: Signal, what: str, instead: str = "leave it out there") -> Tensor:
    """Return the parameter, which `what` of a level needs. Raises ValueError where the level itself is the memory."""
    if signal.param is None:
        raise ValueError(
            f"{level.label}: {what} needs the parameter, and a level that is itself the memory (on tokens) has none; "
            f"{instead}"
        )
    return signal.param


def warn_of_mode(part: Part, what: str) -> None:
    """Warn, once, that a part runs in a mode that is there for its letter."""
    # from this one place, so that Python's own filter shows it once, whoever made the part
    warnings.warn(f"{part.label}: mode={part.mode!r} is {what}; leave mode out to train", stacklevel=1)  # type: ignore[attr-defined]
