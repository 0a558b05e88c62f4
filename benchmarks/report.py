"""Results as a Markdown table, as JSON and as a picture."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from benchmarks.cells import grid, number
from benchmarks.timing import Timing, ratio
from nestopt.config.files import replacing


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
        finite: whether all that came out was.
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
    finite: bool | None = None
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
        """As text. A column that no row has anything for is left out."""
        timed = [line for line in self.lines if not line.problem]
        columns = [(head, cell) for head, cell in _columns(self.reference) if any(cell(line) != "–" for line in timed)]
        rows = [["", *(head for head, _ in columns)]]
        for line in self.lines:
            rows.append([line.name, *(cell(line) if not line.problem else "–" for _, cell in columns)])
        problems = [f"- {line.name}: {line.problem}" for line in self.lines if line.problem]
        head = [f"### {self.name}", "", f"{self.about}; {self.clock}; floors at {self.rates}.", ""]
        return "\n".join([*head, *grid(rows), *([""] if problems else []), *problems, ""])


def _columns(reference: str) -> list[tuple[str, Callable[[Line], str]]]:
    return [
        ("ms", lambda line: number(line.step_ms)),
        (f"× {reference}", lambda line: number(line.ratio)),
        ("quartiles", _quartiles),
        ("n", lambda line: str(line.rounds) if line.rounds else "first step"),
        ("× peer", lambda line: number(line.peer_ratio)),
        ("state, B", lambda line: number(line.state_bytes)),
        ("bytes, ms", lambda line: number(line.bytes_ms)),
        ("FLOPs, ms", lambda line: number(line.flops_ms)),
        ("× floor", lambda line: number(line.step_ms / line.floor_ms if line.step_ms and line.floor_ms else None)),
        ("transient, MiB", lambda line: number(line.transient_mib)),
        ("finite", lambda line: "–" if line.finite is None else "yes" if line.finite else "no"),
    ]


def _quartiles(line: Line) -> str:
    if line.ratio_low is None or line.ratio_high is None:
        return "–"
    return f"{number(line.ratio_low)}–{number(line.ratio_high)}"


def line_of(name: str, timings: Mapping[str, Timing], wanted: str, peer: str = "") -> Line:
    """A row's times and its ratios to `wanted` and `peer`; floors and memory are for the caller to add."""
    timing = timings[name]
    if timing.problem:
        return Line(name, timing.problem)
    line = Line(name, step_ms=1e3 * timing.step_s, rounds=len(timing.rounds), peer=peer)
    line.samples_ms = {i: 1e3 * seconds for i, seconds in timing.rounds.items()}
    found = ratio(timing, timings[wanted])
    if found:
        line.ratio, line.ratio_low, line.ratio_high = found.median, found.low, found.high
    if peer in timings and not timings[peer].problem and (found := ratio(timing, timings[peer])):
        line.peer_ratio = found.median
    return line


def clock_words() -> str:
    """What times are of, by `benchmarks.timing.clock`."""
    threads = torch.get_num_threads()
    return "CPU time, one thread" if threads == 1 else f"wall time, {threads} threads"


def write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, machine: dict[str, Any], tables: Sequence[Any]) -> None:
    """`tables` are dataclasses."""
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
