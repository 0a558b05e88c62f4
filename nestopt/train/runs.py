"""`nestopt runs`: what runs there are, how far they came, in what they differ, and all of them in one picture."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nestopt.config import ConfigError
from nestopt.config.errors import join
from nestopt.config.schema import TrainConfig
from nestopt.train.errors import CheckpointError
from nestopt.train.folder import check_place
from nestopt.train.report.metrics import read
from nestopt.train.run import Run, locate
from nestopt.train.tables import grid

KEYS = 8
"""How many keys in which runs differ are columns of the table."""

_OF_THE_PLACE = {"train.out", "train.name", "train.threads"}


@dataclasses.dataclass(frozen=True)
class Summary:
    """A run at a glance.

    Attributes:
        name: its folder, as it is shown.
        run: its folder.
        config: every key with its value; empty where that can't be read.
        records: its measurements.
        problem: why something of it can't be read, or None.
    """

    name: str
    run: Run
    config: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]
    problem: str | None = None

    @classmethod
    def of(cls, path: Path, name: str) -> Summary:
        """Read a run's folder."""
        run = Run(path)
        config: dict[str, Any] = {}
        records: list[dict[str, Any]] = []
        problem = None
        try:
            config = dict(_leaves("", run.config().to_data()))
            if run.metrics_file.exists():
                records = read(run.metrics_file)
        except (CheckpointError, OSError, ValueError) as error:  # a ConfigError, too
            problem = " ".join(str(error).split())
        return cls(name, run, config, records, problem)

    def last(self, key: str) -> float | None:
        """Return what was measured last of a name; None for nothing."""
        return next((record[key] for record in reversed(self.records) if record.get(key) is not None), None)

    @property
    def best(self) -> float | None:
        """The best score on held-out text on the way, or at the end."""
        scores = [record["eval/bits_per_byte"] for record in self.records if "eval/bits_per_byte" in record]
        return min((score for score in scores if math.isfinite(score)), default=None)

    @property
    def state(self) -> str:
        """Whether it has ended, which is when its model is written."""
        if self.problem:
            return "unreadable"
        measured = bool(self.records) and "eval/bits_per_byte" in self.records[-1]
        return "ended" if measured and self.run.model_file.exists() else "not ended"


def find(paths: Sequence[str]) -> list[Summary]:
    """Return the runs that are meant, in order.

    Args:
        paths: of runs (`nestopt.train.run.locate`), or of folders with runs, or with folders with runs, as a sweep is;
            none means the folder in which runs are kept by default.

    Raises:
        ConfigError: one is neither.
    """
    summaries: dict[Path, Summary] = {}
    for given in paths or [TrainConfig.model_fields["out"].default]:
        root = locate(given)
        if (root / "config.yaml").is_file():
            inside = [root]
        elif not root.is_dir():
            raise ConfigError(f"{given} is no run, and no folder with runs; give one, or begin one: nestopt train")
        else:
            inside = sorted(_runs_in(root))
            if not inside:
                raise ConfigError(f"{given} has no runs in it; give another folder, or begin one: nestopt train")
        for path in inside:
            summaries.setdefault(path, Summary.of(path, str(path.relative_to(root)) if path != root else str(path)))
    names = [summary.name for summary in summaries.values()]
    return [
        dataclasses.replace(each, name=str(path)) if names.count(each.name) > 1 else each
        for path, each in summaries.items()
    ]


def _runs_in(root: Path) -> Iterator[Path]:
    for child in root.iterdir():
        if (child / "config.yaml").is_file():
            yield child
        elif child.is_dir():
            yield from (file.parent for file in child.glob("*/config.yaml"))


def table(runs: Sequence[Summary]) -> str:
    """Return a line a run: how far it came, its bits per byte, and the keys in which it differs from others."""
    keys = differing(runs)
    short = {key: key.rpartition(".")[2] for key in keys}
    names = [short[key] if list(short.values()).count(short[key]) == 1 else key for key in keys[:KEYS]]
    rows = [("run", "state", "steps", "seconds", "training", "held out", "best", *names)]
    for each in runs:
        step, seconds = each.last("step"), each.last("seconds")
        rows.append(
            (
                each.name,
                each.state,
                "-" if step is None else f"{step:,}",
                "-" if seconds is None else f"{seconds:.0f}",
                *(
                    _bits(value)
                    for value in (each.last("train/bits_per_byte"), each.last("eval/bits_per_byte"), each.best)
                ),
                *(_cell(each.config.get(key)) for key in keys[:KEYS]),
            )
        )
    lines = [line.rstrip() for line in grid(rows, left=2)]
    lines.append("training, held out and best: bits per byte, the last, and the best of the held-out text")
    if len(keys) > KEYS:
        lines.append(f"they differ in {len(keys) - KEYS} more keys: {', '.join(keys[KEYS:])}")
    lines += [f"{each.name}: {each.problem}" for each in runs if each.problem]
    return "\n".join(lines)


def differing(runs: Iterable[Summary]) -> list[str]:
    """Return the keys that do not have one value in all runs, but for where those are kept."""
    readable = [each.config for each in runs if each.config]
    keys = dict.fromkeys(key for config in readable for key in config if key not in _OF_THE_PLACE)
    return [key for key in keys if len({json.dumps(config.get(key)) for config in readable}) > 1]


def as_json(runs: Sequence[Summary]) -> str:
    """Return all that is known of the runs, for other programs."""
    rows = [
        {
            "run": each.name,
            "path": str(each.run.path),
            "state": each.state,
            "problem": each.problem,
            "step": each.last("step"),
            "seconds": each.last("seconds"),
            **{key: each.last(key) for key in ("train/bits_per_byte", "eval/bits_per_byte")},
            "best": each.best,
            "config": dict(each.config),
        }
        for each in runs
    ]
    return json.dumps([{key: _finite(value) for key, value in row.items()} for row in rows], indent=1, allow_nan=False)


def plot(runs: Sequence[Summary], path: str | os.PathLike[str]) -> None:
    """Draw the runs in one picture.

    Raises:
        ConfigError: nothing was measured, or no picture can be written there; its name ends in .png, .svg or .pdf.
    """
    from nestopt.train.report.plots import runs_plot

    if Path(path).suffix not in (".png", ".svg", ".pdf"):
        raise ConfigError.refuse("--plot", str(path), "give a file that ends in .png, .svg or .pdf")
    check_place("--plot", Path(path))
    drawn = {each.name: each.records for each in runs if each.last("train/bits_per_byte") or each.best is not None}
    if not drawn:
        raise ConfigError("nothing to draw: none of these runs has measured anything yet", "--plot")
    runs_plot(drawn, path)


def _bits(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _cell(value: Any) -> str:
    text = "null" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 24 else f"{text[:23]}…"


def _finite(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the keys of plain data and their values; lists are values."""
    if isinstance(value, dict) and value:
        for key, child in value.items():
            yield from _leaves(join(path, key), child)
    else:
        yield path, value
