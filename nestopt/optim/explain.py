"""Which parameter has which level, and why."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from nestopt.core.level import Level
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
        label, params = level_of(group).label, group["params"]
        reasons = group.get("why") or [UNROUTED] * len(params)
        for name, param, why in zip(names(group, g), params, reasons, strict=True):
            shape, rate, period = tuple(param.shape), float(group["lr"]), group.get("period", 1)
            rows.append(Row(name, shape, label, rate, period, why, frozen=not param.requires_grad))
    return rows
