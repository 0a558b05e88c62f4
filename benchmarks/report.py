"""Results as a Markdown table, as JSON and as a picture."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from nestopt.train.checkpoint import replacing


@dataclasses.dataclass
class Line:
    """One row of a table. Numbers that could not be had are None.

    Attributes:
        name: of the candidate.
        problem: why there are no times.
        step_ms: median over rounds, of a step.
        rounds: how many rounds fitted; 0 means that `step_ms` is the first step, which alone went over the time cap.
        ratio, ratio_low, ratio_high: to the table's reference in the same round: median and quartiles.
        peer, peer_ratio: the same, median, to the row that this one is to be compared with.
        state_bytes: held between steps, a parameter.
        bytes_ms, flops_ms: floors, from bytes moved and from floating-point operations.
        transient_mib: of a step, beyond what is held.
        samples_ms: by round, for any other ratio.
    """

    name: str
    problem: str = ""
    step_ms: float | None = None
    rounds: int = 0
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    peer: str = ""
    peer_ratio: float | None = None
    state_bytes: float | None = None
    bytes_ms: float | None = None
    flops_ms: float | None = None
    transient_mib: float | None = None
    samples_ms: dict[int, float] = dataclasses.field(default_factory=dict)

    @property
    def floor_ms(self) -> float | None:
        """The larger of the two floors: moving and computing may overlap, so their sum would be no bound."""
        return max(self.bytes_ms or 0.0, self.flops_ms or 0.0) or None


@dataclasses.dataclass
class Table:
    """Attributes:
    name, about: of what was timed.
    reference: the row that ratios are to.
    clock: what the times are of.
    rates: that floors were computed from, in words.
    lines: the rows.
    """

    name: str
    about: str
    reference: str
    clock: str
    rates: str
    lines: list[Line]

    def markdown(self) -> str:
        memory = any(line.transient_mib is not None for line in self.lines)
        heads = [
            "",
            "ms",
            f"× {self.reference}",
            "quartiles",
            "n",
            "× peer",
            "state, B",
            "bytes, ms",
            "FLOPs, ms",
            "× floor",
        ]
        heads += ["transient, MiB"] * memory
        rows = [heads, ["---", *["---:"] * (len(heads) - 1)]]
        for line in self.lines:
            rows.append(_cells(line, memory) if not line.problem else [line.name, *["–"] * (len(heads) - 1)])
        widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
        table = [
            "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
        ]
        problems = [f"- {line.name}: {line.problem}" for line in self.lines if line.problem]
        head = [f"### {self.name}", "", f"{self.about}; {self.clock}; floors at {self.rates}.", ""]
        return "\n".join([*head, *table, *([""] if problems else []), *problems, ""])


def _cells(line: Line, memory: bool) -> list[str]:
    over = line.step_ms / line.floor_ms if line.step_ms and line.floor_ms else None
    quartiles = "–"
    if line.ratio_low is not None and line.ratio_high is not None:
        quartiles = f"{number(line.ratio_low)}–{number(line.ratio_high)}"
    cells = [
        line.name,
        number(line.step_ms),
        number(line.ratio),
        quartiles,
        str(line.rounds) if line.rounds else "first step",
        number(line.peer_ratio),
        number(line.state_bytes),
        number(line.bytes_ms),
        number(line.flops_ms),
        number(over),
    ]
    return cells + [number(line.transient_mib)] * memory


def number(value: float | None) -> str:
    """Three significant digits, without exponents; a dash for what could not be had."""
    if value is None or math.isnan(value):
        return "–"
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{round(value, digits):,.{min(digits, 4)}f}"


def write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, machine: dict[str, Any], tables: Sequence[Table]) -> None:
    report = {"machine": machine, "tables": [dataclasses.asdict(table) for table in tables]}
    write(path, json.dumps(report, indent=1, ensure_ascii=False) + "\n")


def plot(path: Path, tables: Sequence[Table]) -> None:
    """Time of a step as a bar, its floor as a mark on it, one panel a table; the suffix of `path` gives the format."""
    panels = [(table, [line for line in table.lines if line.step_ms]) for table in tables]
    panels = [(table, lines) for table, lines in panels if lines]
    if not panels:
        raise ValueError("nothing to draw: no row was timed")
    heights = [len(lines) + 1 for _, lines in panels]
    figure = Figure(figsize=(8, 0.28 * sum(heights) + 0.5 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), squeeze=False, height_ratios=heights)[:, 0]
    for axis, (table, lines) in zip(axes, panels, strict=True):
        ours = ["#2a6fb0" if "nestopt" in line.name else "#b8bec6" for line in lines]
        positions = range(len(lines))
        bars = axis.barh(positions, [line.step_ms for line in lines], color=ours, height=0.7)
        axis.bar_label(bars, [number(line.step_ms) for line in lines], padding=3, fontsize=7)
        floors = [(i, line.floor_ms) for i, line in enumerate(lines) if line.floor_ms]
        axis.plot(
            [ms for _, ms in floors], [i for i, _ in floors], "|", color="#d1495b", markersize=11, markeredgewidth=2
        )
        axis.set_xscale("log")
        axis.xaxis.set_minor_formatter(NullFormatter())
        # A logarithmic bar has no zero to start from: leave room below the least of what is drawn.
        least = min([ms for _, ms in floors] + [line.step_ms for line in lines])
        axis.set_xlim(least / 2, 2 * max(line.step_ms for line in lines))
        axis.set_yticks(positions, [line.name for line in lines], fontsize=8)
        axis.invert_yaxis()
        axis.set_title(f"{table.name}: ms per step, floor marked", fontsize=9, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix.removeprefix(".") or "svg")
