"""Which parameter has which level, and why."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from nestopt.core.clock import start
from nestopt.core.compose import Chain
from nestopt.core.gates import bind, schedules_of
from nestopt.core.level import Level
from nestopt.core.nesting import Nest
from nestopt.core.signal import Signal
from nestopt.core.weights import around
from nestopt.levels.continuum.level import Cms
from nestopt.optim.checks import names

UNROUTED = "given by the caller"


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter: its name, shape, level, learning rate and the period of its group, why it has that level, and
    whether it is frozen, so that nothing is done to it until it is not.
    """

    name: str
    shape: tuple[int, ...]
    level: str
    lr: float
    period: int
    why: str
    frozen: bool = False


class Explanation(list[Row]):
    """The rows, in the optimizer's order; prints as a table with a count per level."""

    def __str__(self) -> str:
        head = ("parameter", "shape", "level", "lr", "period", "why")
        cells = [
            (row.name, "×".join(map(str, row.shape)) or "()", row.level, f"{row.lr:g}", str(row.period), why)
            for row in self
            for why in [f"frozen; {row.why}" if row.frozen else row.why]
        ]
        widths = [max(len(line[i]) for line in [head, *cells]) for i in range(len(head))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in [head, *cells]
        ]
        totals: dict[str, list[int]] = {}
        for row in self:
            count = totals.setdefault("frozen" if row.frozen else row.level, [0, 0])
            count[0], count[1] = count[0] + 1, count[1] + math.prod(row.shape)
        total = [
            f"{level}: {tensors} tensor{'s' if tensors > 1 else ''}, {numbers:,} numbers"
            for level, (tensors, numbers) in totals.items()
        ]
        return "\n".join([*lines, "", *total])


def explain(groups: Sequence[dict[str, Any]], level_of: Callable[[dict[str, Any]], Level]) -> Explanation:
    """Return the routing of every parameter of these groups."""
    rows = Explanation()
    for g, group in enumerate(groups):
        level, params = level_of(group), group["params"]
        said = [f"{path}: {_shown(value)}" for path, value in schedules_of(level).items()]
        said += [*_sums(bind(level)), *(own.explained() for _, own in around(bind(level)))]
        label, clocks = level.label, "".join(f"; {one}" for one in said)
        reasons = [why + clocks for why in group.get("why") or [UNROUTED] * len(params)]
        for name, param, why in zip(names(group, g), params, reasons, strict=True):
            shape, rate, period = tuple(param.shape), float(group["lr"]), group.get("period", 1)
            rows.append(Row(name, shape, label, rate, period, why, frozen=not param.requires_grad))
    return rows


def _shown(value: Any) -> str:
    """Return a number, a schedule, or several of these, as a reader would have them."""
    return f"({', '.join(map(_shown, value))})" if isinstance(value, tuple) else str(value)


def _sums(level: Level) -> list[str]:
    """Say of each level on a clock, within this one, whose direction is as long as what it sees, what it applies."""
    c, found = level.period, []
    if c > 1 and level.clock == "sum" and _follows_scale(level):
        found.append(f"{level.label} applies the sum of {c} gradients at each of {c} steps (clock='mean': their mean)")
    # the outer level of a nest takes no gradients
    inner = level.clocks() if isinstance(level, Cms) else level.inner if isinstance(level, Nest) else None
    parts = [inner] if inner is not None else [part for _, part in level.parts() if isinstance(part, Level)]
    said: list[str] = []
    for part in parts:
        if isinstance(level, Chain) and not _follows_scale(part):
            said = []  # what came before is forgotten
        said += _sums(part)
    return [*found, *said]


def _follows_scale(level: Level) -> bool:
    """Return whether the direction is longer for a longer gradient; of a level that can't be tried, False."""
    param, grad = torch.zeros(2, 2), torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    try:
        with torch.random.fork_rng([]), torch.no_grad():
            state, signal = start(dataclasses.replace(level, period=1), param), Signal(1, param, 1e-3)
            short, long = (level.step(scale * grad, state, signal)[0] for scale in (1, 16))
    except Exception:
        return False
    return bool(long.norm() > 2 * short.norm())
