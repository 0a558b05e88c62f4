"""Models side by side, on the same bytes: each still, and learning as it reads, under one rule for all of them."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nestopt import models
from nestopt.config import Config, ConfigError, ModelConfig
from nestopt.config.files import replacing, write
from nestopt.config.spec import build
from nestopt.core import Level
from nestopt.core.memories import Mlp, Window
from nestopt.levels.continuum.level import Cms
from nestopt.levels.presets import Attention, WindowAttention
from nestopt.levels.self_modifying.level import SelfModifying
from nestopt.models.continua import continua, learning
from nestopt.train.data.source import HeldOut
from nestopt.train.engines.engine import device_of
from nestopt.train.errors import CheckpointError, extra
from nestopt.train.loop import train
from nestopt.train.reading import at_best_rate, learner, read, reading_rule, texts
from nestopt.train.run import Result
from nestopt.train.tables import grid

with extra("train"):
    from matplotlib.figure import Figure
    from tqdm import tqdm

THIS, TOKENS, SECONDS = "this run", "equal tokens", "equal seconds"

NEAR = 0.02
"""How far the parameters of two models that are compared may differ, of the one."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One run, measured.

    Attributes:
        model: its name.
        limit: what it was trained as long as: `THIS`, `TOKENS` or `SECONDS`.
        seed: of the run.
        parameters: of its model.
        steps, seconds: of training.
        still: bits per byte of held-out text, read with its MLPs as they are.
        learning: the same, read with each MLP learning; None where its MLPs can't.
        rate: at which they do.
        still_s, learning_s: CPU seconds of both readings.
    """

    model: str
    limit: str
    seed: int
    parameters: int
    steps: int
    seconds: float
    still: float
    learning: float | None
    rate: float
    still_s: float
    learning_s: float


def like(config: Config, name: object) -> Config:
    """Return `config` with another model in the place of its own: as many parameters, by the width of its MLPs.

    All else is the same for both: width, blocks, heads, convolutions, gates, the optimizer, and how MLPs are trained.

    Args:
        config: of the run.
        name: `transformer` (`hope-attention` is it, once its MLPs learn as it reads), `hope`, or any level on tokens.
            Where held-out text is read in streams, attention is to the last `data.window` tokens, as in training.

    Raises:
        ConfigError: there is no such level, no model of it comes within 2 % of the parameters, or the MLPs learn by
            rules of their own.
    """
    section = config.model
    learning(section)  # by one rule, which is then all models'
    mixer, wanted = _mixer(config, name), parameters(section)

    def one(mlp: Cms, hidden: int) -> Cms:
        """On the fastest of its clocks."""
        periods, memory = (next(iter(mlp.chain().values())),), Mlp(hidden=hidden, residual=False)
        return dataclasses.replace(mlp, periods=periods, variant="sequential", weights=None, memory=memory)

    def of(hidden: int) -> ModelConfig:
        found = [one(mlp, hidden) for mlp in continua(section)]
        mlps = {"mlps": found} if section.mlps else {"mlp": found[0]}
        return section.model_copy(update={"mixer": mixer, "mixers": [], **mlps})

    return config.model_copy(update={"model": as_large(of, wanted, name)})


def as_large(of: Callable[[int], ModelConfig], wanted: int, name: object) -> ModelConfig:
    """Return the model of that width of its MLPs with which it has as many parameters as are wanted.

    Raises:
        ConfigError: it has none within 2 %; says `name`.
    """
    least = parameters(of(1))
    hidden = max(1, 1 + round((wanted - least) / (parameters(of(2)) - least)))
    found = parameters(of(hidden))
    if abs(found - wanted) > NEAR * wanted:
        raise ConfigError.refuse(
            "--baseline", name, f"it has {found:,} parameters or more, and the model {wanted:,}; give a larger model"
        )
    return of(hidden)


def _mixer(config: Config, name: object) -> Level:
    if name in ("transformer", "hope-attention"):
        return WindowAttention(memory=Window(config.data.window)) if config.train.eval_streams else Attention()
    if name == "hope":
        own = [level for level in config.model.mixers or [config.model.mixer] if isinstance(level, SelfModifying)]
        return own[0] if own else SelfModifying()
    try:
        level: Level = build("level", name)
        models.build_model(config.model.model_copy(update={"mixer": level, "mixers": [], "blocks": 1}))
    except ConfigError as error:
        raise ConfigError.of([ConfigError(problem.problem, "--baseline") for problem in error.errors]) from None
    return level


def parameters(section: ModelConfig) -> int:
    """Return how many numbers the model has that `section` describes."""
    with torch.device("meta"):
        return sum(p.numel() for p in models.build_model(section).parameters())


def compare(
    config: Config, result: Result, names: Sequence[str] = ("transformer",), *, seeds: int = 1, quiet: bool = False
) -> list[Row]:
    """Train other models on as many tokens as a run, and for as long, and measure all of them in the same way.

    Every model is read twice on the same held-out text: still, and with its MLPs learning from the loss, at the rate
    that is best for it on other held-out text. The runs are kept in the folder `baseline` of the run; `compare.png` and
    `compare.json` show them.

    Args:
        config: of the finished run.
        result: of it.
        names: of the other models, as for `like`.
        seeds: how often all are trained, each time from another seed; that of the config is the first.
        quiet: no progress bar and no report.

    Returns:
        The rows, the run's own first; fewer, if a run was interrupted.

    Raises:
        ConfigError: as `like`.
        CorpusError: there is too little held-out text.
    """
    if not result.finished:
        raise ValueError("compare: the run was interrupted; go on with it first")
    out = result.run.path / "baseline"
    if os.path.islink(out):
        raise CheckpointError(f"{out}: is a link; runs are written to folders of their own, remove it")
    tune, test = texts(config)
    rows: list[Row] = []
    for name, limit, run, found in _runs(config, result, names, seeds, out, quiet):
        if not found.finished:
            break
        rows.append(_measure(name, limit, run, found, tune, test, quiet))
    comparison_plot(rows, result.run.path / "compare.png")
    write(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n", result.run.path / "compare.json")
    if not quiet:
        print(table(rows, len(tune.tokens), test.bytes), flush=True)
    return rows


def _runs(
    config: Config, result: Result, names: Sequence[str], seeds: int, out: Path, quiet: bool
) -> Iterator[tuple[str, str, Config, Result]]:
    """Train one after another; gives each with its name, limit and configuration."""

    def trained(what: str, base: Config, **settings: Any) -> tuple[Config, Result]:
        if not quiet:
            print(f"{what}:", flush=True)
        run = base.model_copy(
            update={"train": base.train.model_copy(update={"out": str(out), "name": None, **settings})}
        )
        return run, train(run, quiet=quiet)

    for i in range(seeds):
        seed = config.train.seed + i
        own = (config, result) if i == 0 else trained(f"this model, seed {seed}", config, seed=seed)
        yield "this model", THIS, *own
        for name in names:
            limits: Mapping[str, Mapping[str, Any]] = {
                TOKENS: {"steps": own[1].step, "seconds": None},
                SECONDS: {"steps": _NEVER, "seconds": own[1].seconds},
            }
            for limit, given in limits.items():
                what = f"{name}, {limit}" + (f", seed {seed}" if seeds > 1 else "")
                yield name, limit, *trained(what, like(config, name), seed=seed, **given)


_NEVER = 10**9


def _measure(name: str, limit: str, config: Config, result: Result, tune: HeldOut, test: HeldOut, quiet: bool) -> Row:
    still = result.run.load_model(device_of(config.train.device))
    still_bits, still_s = read(config, still, test, "mixer")
    model = learner(config, still, reading_rule(learning(config.model)))
    bits, learning_s, rate = None, math.nan, math.nan
    if model is not None:
        bar = partial(tqdm, desc=f"{name}: rates", leave=False, disable=quiet, dynamic_ncols=True)
        rate = min(at_best_rate(config, model, tune, bar=bar), key=lambda found: found.bits).rate
        bits, learning_s = read(config, model, test)
    return Row(
        name,
        limit,
        config.train.seed,
        sum(p.numel() for p in still.parameters()),
        result.step,
        result.seconds,
        still_bits,
        bits,
        rate,
        still_s,
        learning_s,
    )


def table(rows: Sequence[Row], tuning: int, tested: int) -> str:
    """Return the comparison as text: a line a model and limit, of several seeds their mean and deviation."""
    lines = [("", "parameters", "steps", "seconds", "still", "reading", "learning", "at rate", "reading")]
    for (model, limit), same in _grouped(rows).items():
        learning = [row.learning for row in same if row.learning is not None]
        lines.append(
            (
                model if limit == THIS else f"{model}, {limit}",
                f"{same[0].parameters:,}",
                f"{statistics.fmean(row.steps for row in same):,.0f}",
                f"{statistics.fmean(row.seconds for row in same):.0f}",
                spread([row.still for row in same]),
                f"{statistics.fmean(row.still_s for row in same):.0f} s",
                spread(learning) if learning else "–",
                f"{statistics.fmean(row.rate for row in same):.3g}" if learning else "–",
                f"{statistics.fmean(row.learning_s for row in same):.0f} s" if learning else "–",
            )
        )
    seeds = len({row.seed for row in rows})
    said = f"bits per byte of {tested:,} held-out bytes, read with MLPs as they are (still), and with each "
    said += f"learning from the loss, at the rate that is best on {tuning:,} other bytes; reading: CPU seconds"
    return "\n".join([*grid(lines, left=1), said + (f"; mean and deviation of {seeds} seeds" if seeds > 1 else "")])


def spread(values: Sequence[float]) -> str:
    """Return `1.234`, or of several `1.234 ± 0.005`, the standard deviation."""
    mean = f"{statistics.fmean(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.3f}"


def _grouped(rows: Sequence[Row]) -> dict[tuple[str, str], list[Row]]:
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row.model, row.limit), []).append(row)
    return found


def comparison_plot(rows: Sequence[Row], path: Path) -> None:
    """Draw bits per byte of all models, still and learning."""
    groups = list(_grouped(rows).items())
    figure = Figure(figsize=(8, 1.2 + 0.45 * len(groups)), dpi=150, layout="constrained")
    axes = figure.subplots()
    for y, (_, same) in enumerate(groups):
        ends = [statistics.fmean(row.still for row in same)]
        for row in same:
            axes.plot(row.still, y, "o", color=_STILL, markersize=6, label="still" if row is rows[0] else None)
            if row.learning is not None:
                label = "learning as it reads" if row is rows[0] else None
                axes.plot(row.learning, y, "o", color=_LEARNING, markersize=6, label=label)
        ends += [statistics.fmean(row.learning for row in same if row.learning is not None)] if same[0].learning else []
        axes.plot(ends, [y] * len(ends), "-", color="#bbbbbb", linewidth=1.5, zorder=0)
        for bits in ends:
            axes.annotate(f"{bits:.3f}", (bits, y), (0, 6), textcoords="offset points", ha="center", fontsize=8)
    names = [model if limit == THIS else f"{model}, {limit}" for (model, limit), _ in groups]
    axes.set_yticks(range(len(groups)), names)
    axes.set_ylim(len(groups) - 0.5, -0.6)
    axes.set_xlabel("bits per byte, held out")
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")


_STILL, _LEARNING = "#7f9fd1", "#c1440e"
