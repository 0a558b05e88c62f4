"""The picture: mean ranks at equal steps and in equal time."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

from matplotlib.figure import Figure

from benchmarks.optimizer_quality.rows import ROWS
from benchmarks.optimizer_quality.table import Outcomes, by_steps, by_time, ranks
from nestopt.config.files import replacing


def draw(path: Path, known: Outcomes) -> None:
    """Draw one line an optimizer, its rank at equal steps filled and in equal CPU time hollow."""
    of_steps, of_time = ranks(known, by_steps), ranks(known, by_time)
    figure = Figure(figsize=(7.5, 0.27 * len(of_steps) + 1), layout="constrained")
    axis = figure.subplots()
    for y, name in enumerate(of_steps):
        left, right = fmean(of_steps[name]), fmean(of_time[name])
        color = "#2a6fb0" if ROWS[name].needs == "nestopt" else "#7d8590"
        axis.plot([left, right], [y, y], color=color, linewidth=1, alpha=0.5)
        axis.plot(left, y, "o", color=color, markersize=6)
        axis.plot(right, y, "o", color=color, markersize=6, markerfacecolor="white")
    axis.set_yticks(range(len(of_steps)), of_steps, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("mean rank, 1 is best: ● equal steps, ○ equal CPU time; blue: nestopt", fontsize=8)
    axis.grid(axis="x", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})
