"""Momentum that a schedule sets: `OneCycleLR` and `CyclicLR` write one number into each parameter group."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator

from torch import Tensor

from nestopt.core.associative import AssociativeMemory
from nestopt.core.gates import with_values
from nestopt.core.level import Level
from nestopt.core.part import Gate
from nestopt.core.schedule import Schedule

log = logging.getLogger("nestopt")


def cycled(level: Level, momentum: float) -> Level:
    """Return `level` with `momentum` as the β of its fastest average of gradients; of averages alike, of all of them.

    A level without one stays as it is, which is said once.
    """
    found = list(_averages(level))
    if not found:
        _say_none(level.label)
        return level
    fastest = min(memory for _, memory, _ in found)
    return with_values(
        level, {path: (momentum, *rest) if rest else momentum for path, memory, rest in found if memory == fastest}
    )


def _averages(level: Level, prefix: str = "", period: int = 1) -> Iterator[tuple[str, float, tuple[float, ...]]]:
    """Yield the averages of gradients in a level: path of the field, what a step of the optimizer keeps, other βs."""
    every = period * level.period
    if level.momentum_field is not None:
        value = getattr(level, level.momentum_field)
        beta, *rest = value if isinstance(value, tuple) else (value,)
        beta = beta.init if isinstance(beta, Gate) else beta.at(1) if isinstance(beta, Schedule) else beta
        if not isinstance(beta, Tensor):  # which is not looked at: it may be on an accelerator
            yield prefix + level.momentum_field, beta ** (1 / every), tuple(rest)
    if not isinstance(level, AssociativeMemory):  # whose rule learns a memory, and averages no gradients of ours
        for name, part in level.parts():
            if isinstance(part, Level):
                yield from _averages(part, f"{prefix}{name}.", every)


@functools.cache
def _say_none(label: str) -> None:
    log.warning("%s has no average of gradients: a schedule of its momentum changes nothing", label)
