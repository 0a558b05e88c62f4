"""The picture of a training run: bits per byte against steps."""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nestopt.config.files import replacing
from nestopt.train.errors import extra

with extra("train"):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = npt.NDArray[np.float64]

_CURVE, _HELD_OUT, _REFERENCE = "#2a6fb0", "#d1495b", "#555555"
_SETTLED = 0.04  # of the steps: the fall from the first loss is left out of the picture's height


def loss_plot(
    records: Sequence[Mapping[str, Any]],
    path: str | os.PathLike[str],
    references: Mapping[str, float],
    *,
    title: str = "",
    train_key: str = "train/bits_per_byte",
    held_out_key: str = "eval/bits_per_byte",
) -> None:
    """Draw a run's training loss, its held-out loss, and what they are to be compared with; replaces ``path`` at once.

    The training loss is drawn light as it is, and strong as a mean over 4 % of the run, centred. A loss that is NaN or
    infinite leaves a gap, and the first such step is marked.

    Args:
        records: as `nestopt.train.report.metrics.read` gives them; those with ``"step"`` and either key are drawn.
        path: the picture; its suffix says which kind (``.png``, ``.svg``, ``.pdf``).
        references: bits per byte by name, drawn as labelled horizontal lines.
        title: above the picture.
        train_key, held_out_key: names of the two losses in the records, in bits per byte.

    Raises:
        ValueError: if no record holds either loss.
    """
    train, held_out = _series(records, train_key), _series(records, held_out_key)
    if not len(train[0]) and not len(held_out[0]):
        raise ValueError(f"nothing to draw: no record holds 'step' and {train_key!r} or {held_out_key!r}")
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set(xlabel="step", ylabel="bits per byte")
    smooth = _smooth(train[1], width=max(1, round(0.04 * len(train[1]))))
    if len(train[0]):
        axes.plot(*train, color=_CURVE, alpha=0.25, linewidth=0.8)
        axes.plot(train[0], smooth, color=_CURVE, linewidth=2, label=_label("training", smooth))
    if len(held_out[0]):
        label = _label("held out", held_out[1])
        axes.plot(*held_out, "o", color=_HELD_OUT, markersize=5, markeredgecolor="white", label=label, zorder=4)
    low, high = _height(train, smooth, held_out, references.values())
    axes.set_ylim(low, high)
    axes.set_xlim(0, max([*train[0], *held_out[0], 1]) * 1.01)
    _draw_references(axes, references)
    _mark_divergence(axes, [train, held_out])
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, borderaxespad=0.2, borderpad=0)
    axes.set_title(title, loc="left", fontsize=11, pad=24)  # the legend lies between, where it can hide no data
    with replacing(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix.removeprefix(".") or "png")


def runs_plot(
    runs: Mapping[str, Sequence[Mapping[str, Any]]],
    path: str | os.PathLike[str],
    *,
    train_key: str = "train/bits_per_byte",
    held_out_key: str = "eval/bits_per_byte",
) -> None:
    """Draw several runs in one picture, each in a colour: a line for training, as a mean over 4 %, dots for held out.

    Args:
        runs: records by the run's name, as `nestopt.train.report.metrics.read` gives them.
        path: the picture, which is replaced at once.
        train_key, held_out_key: names of the two losses in the records, in bits per byte.
    """
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set(xlabel="step", ylabel="bits per byte")
    limits = []
    for number, (name, records) in enumerate(runs.items()):
        train, held_out, colour = _series(records, train_key), _series(records, held_out_key), f"C{number % 10}"
        smooth = _smooth(train[1], width=max(1, round(0.04 * len(train[1]))))
        label = _label(name, held_out[1] if len(held_out[0]) else smooth)
        axes.plot(train[0], smooth, color=colour, linewidth=1.5, label=label)
        axes.plot(*held_out, "o", color=colour, markersize=5, markeredgecolor="white", zorder=4)
        limits.append(_height(train, smooth, held_out, ()))
    axes.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix.removeprefix(".") or "png")


def _series(records: Iterable[Mapping[str, Any]], key: str) -> tuple[Floats, Floats]:
    points = [(r["step"], r[key]) for r in records if r.get("step") is not None and r.get(key) is not None]
    steps, values = np.array(points, dtype=np.float64).reshape(-1, 2).T
    return steps, values


def _smooth(values: Floats, width: int) -> Floats:
    """Return the centred mean over the finite of ``width`` values (fewer at the ends); NaN where there are none."""
    finite = np.isfinite(values)
    before, after = width // 2, width - width // 2
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    place = np.arange(len(values))
    first, last = np.maximum(place - before, 0), np.minimum(place + after, len(values))
    here = counts[last] - counts[first]
    return np.where(finite & (here > 0), (sums[last] - sums[first]) / np.maximum(here, 1), np.nan)


def _label(name: str, values: Floats) -> str:
    finite = values[np.isfinite(values)]
    if not len(finite):
        return name
    return f"{name} ({'last' if math.isfinite(values[-1]) else 'last finite'} {finite[-1]:.3f})"


def _height(
    train: tuple[Floats, Floats], smooth: Floats, held_out: tuple[Floats, Floats], references: Iterable[float]
) -> tuple[float, float]:
    """Return limits of the y axis: all that is drawn, but for the steep fall at the start and single outliers."""
    steps = np.concatenate([train[0], held_out[0]])
    settled = _SETTLED * steps.max()
    shown = [*smooth[train[0] >= settled], *held_out[1][held_out[0] >= settled], *references]
    raw = train[1][(train[0] >= settled) & np.isfinite(train[1])]
    if len(raw):
        shown += [*np.percentile(raw, [1, 99])]
    finite = [value for value in shown if math.isfinite(value)] or [0.0, 8.0]
    low, high = min(finite), max(finite)
    margin = 0.06 * (high - low) or 0.1
    return low - margin, high + margin


def _draw_references(axes: Axes, references: Mapping[str, float]) -> None:
    """Draw dashed lines, labelled at their right end, outside the axes; labels of near lines are moved apart."""
    low, high = axes.get_ylim()
    apart = 0.045 * (high - low)  # the height of a label
    place = -math.inf
    for name, value in sorted(references.items(), key=lambda item: item[1]):
        axes.axhline(value, color=_REFERENCE, linestyle=(0, (5, 3)), linewidth=1)
        place = max(value, place + apart)
        axes.annotate(
            f"{name}  {value:.2f}",
            xy=(1, place),
            xycoords=("axes fraction", "data"),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            color=_REFERENCE,
            fontsize=9,
            annotation_clip=False,
        )


def _mark_divergence(axes: Axes, series: Iterable[tuple[Floats, Floats]]) -> None:
    steps = [steps[~np.isfinite(values)] for steps, values in series]
    bad = np.concatenate(steps)
    if len(bad):
        axes.axvline(bad.min(), color=_HELD_OUT, linewidth=1, label=f"not finite from step {bad.min():.0f}")
