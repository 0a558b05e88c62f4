"""A run beside a Transformer of as many parameters, trained on the same bytes: at equal tokens and at equal seconds."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from nestopt import models
from nestopt.config import Config, ModelConfig
from nestopt.config.files import replacing
from nestopt.core.memories import Mlp, Window
from nestopt.levels.continuum.level import Cms
from nestopt.levels.presets import Attention, WindowAttention
from nestopt.train.errors import CheckpointError, extra
from nestopt.train.loop import train
from nestopt.train.report.metrics import read
from nestopt.train.tables import grid
from nestopt.train.training import Result

with extra("train"):
    from matplotlib.figure import Figure

TOKENS, SECONDS = "Transformer, equal tokens", "Transformer, equal seconds"


@dataclasses.dataclass(frozen=True)
class Row:
    """One run of a comparison.

    Attributes:
        name: of its model.
        parameters: of its model.
        result: how it ended.
    """

    name: str
    parameters: int
    result: Result


def transformer_like(config: Config) -> Config:
    """Return `config` with a Transformer of as many parameters, by the width of its MLPs, in its model's place.

    Where held-out text is read in streams, its attention is to the last `data.window` tokens, as long as it was
    trained on: it reads streams, too.
    """
    section = config.model
    attention = WindowAttention(memory=Window(config.data.window)) if config.train.eval_streams else Attention()
    wanted = parameters(section)

    def like(hidden: int) -> ModelConfig:
        mlp = Cms(periods=(1,), memory=Mlp(hidden=hidden, residual=False))
        return section.model_copy(update={"mixer": attention, "mixers": [], "mlp": mlp, "gate_output": False})

    least = parameters(like(1))
    each = parameters(like(2)) - least
    hidden = max(1, 1 + round((wanted - least) / each))
    return config.model_copy(update={"model": like(hidden)})


def parameters(section: ModelConfig) -> int:
    """Return how many numbers the model has that `section` describes."""
    with torch.device("meta"):
        return sum(p.numel() for p in models.build_model(section).parameters())


def compare(config: Config, result: Result, *, quiet: bool = False) -> list[Row]:
    """Train the Transformer of `transformer_like` twice: on as many tokens as `result`'s run, and for as long.

    Its runs are kept in the folder `baseline` of the run, whose `compare.png` shows all three.

    Args:
        config: of the finished run.
        result: of it.
        quiet: no progress bar and no report.

    Returns:
        The run itself, and both Transformers.
    """
    if not result.finished:
        raise ValueError("compare: the run was interrupted; go on with it first")
    other = transformer_like(config)
    settings = config.train
    out = str(result.run.path / "baseline")
    if os.path.islink(out):
        raise CheckpointError(f"{out}: is a link; runs are written to folders of their own, remove it")
    limits: dict[str, dict[str, Any]] = {
        TOKENS: {"steps": result.step, "seconds": None},
        SECONDS: {"steps": _NEVER, "seconds": result.seconds},
    }
    rows = [Row("this model", parameters(config.model), result)]
    for name, limit in limits.items():
        if not quiet:
            print(f"{name}:", flush=True)
        run = other.model_copy(update={"train": settings.model_copy(update={"out": out, **limit})})
        found = train(run, quiet=quiet)
        rows.append(Row(name, parameters(other.model), found))
        if not found.finished:
            break
    comparison_plot(rows, result.run.path / "compare.png")
    if not quiet:
        print(table(rows), flush=True)
    return rows


_NEVER = 10**9


def table(rows: Sequence[Row]) -> str:
    """Return the comparison as text."""
    lines = [("", "parameters", "steps", "seconds", "bits per byte")]
    for row in rows:
        found, bits = row.result, row.result.bits_per_byte
        score = "interrupted" if bits is None else f"{bits:.3f}"
        lines.append((row.name, f"{row.parameters:,}", f"{found.step:,}", f"{found.seconds:.0f}", score))
    return "\n".join(grid(lines, left=1))


def comparison_plot(rows: Sequence[Row], path: Path) -> None:
    """Draw held-out bits per byte of all runs, over tokens and over seconds."""
    figure = Figure(figsize=(9, 3.8), dpi=150, layout="constrained")
    for axes, key, label in zip(figure.subplots(1, 2, sharey=True), ("step", "seconds"), _LABELS, strict=True):
        for row, colour in zip(rows, _COLOURS, strict=False):
            points = [r for r in read(row.result.run.metrics_file) if "eval/bits_per_byte" in r]
            values = [r["eval/bits_per_byte"] for r in points]
            last = f"{row.name} ({values[-1]:.3f})" if values else row.name
            axes.plot([r[key] for r in points], values, "o-", markersize=4, color=colour, label=last)
        axes.set_xlabel(label)
        axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("bits per byte, held out")
    figure.axes[1].legend(frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


_LABELS = ("optimizer steps, of equal tokens", "seconds of training")
_COLOURS = ("#c1440e", "#4c72b0", "#7f9fd1")
