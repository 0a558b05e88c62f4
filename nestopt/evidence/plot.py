"""The picture of a forgetting report."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from nestopt.config.files import replacing
from nestopt.evidence.measures import Line, Mean
from nestopt.train.errors import extra

with extra("train"):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#c1440e", "#4c72b0")
"""Of the line that learns, and of the one whose mixers alone do."""


def plot(
    learning: Line, mixer: Line, positions: Sequence[float], times: Sequence[int], path: str | os.PathLike[str]
) -> None:
    """Draw, left, bits per byte over the document, read twice; right, what is still gained after new text.

    Args:
        learning, mixer, positions, times: of a `ForgettingReport`.
        path: of the picture, replaced at once; its suffix says which kind.
    """
    figure = Figure(figsize=(9, 3.8), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    for line, colour, name in zip((learning, mixer), COLOURS, ("learning", "mixers only"), strict=True):
        for look, style, which in ((line.first, "-", "first look"), (line.second, "--", "second look")):
            _curve(left, positions, look.curve, colour, style, f"{name}, {which}")
        places = range(len(times))
        means, errors = zip(*((gain.mean, gain.error) for gain in line.gain), strict=True)
        right.errorbar(places, means, errors, fmt="o-", color=colour, markersize=4, capsize=3, label=name)
    left.set(xlabel="position in the document, bytes", ylabel="bits per byte")
    right.axhline(0, color="#888888", linewidth=0.8)
    right.set_xticks(range(len(times)), [f"{count:,} x" for count in times])
    right.set(xlabel="new text since, in documents", ylabel="gain on what was read, bits per byte")
    for axes in (left, right):
        axes.grid(axis="y", color="#888888", alpha=0.25, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    with replacing(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix.removeprefix(".") or "png", metadata=_undated(path))


def _curve(axes: Axes, positions: Sequence[float], curve: Sequence[Mean], colour: str, style: str, label: str) -> None:
    means = [point.mean for point in curve]
    below, above = ([point.mean + sign * point.error for point in curve] for sign in (-1, 1))
    axes.plot(positions, means, style, color=colour, linewidth=1.6, label=label)
    axes.fill_between(positions, below, above, color=colour, alpha=0.12, linewidth=0)


def _undated(path: str | os.PathLike[str]) -> dict[str, None] | None:
    """Leave out an SVG's date: of the same numbers it is the same file, whenever it is drawn."""
    return {"Date": None} if Path(path).suffix == ".svg" else None
