"""Runs of a problem by an optimizer, at rates swept alike, kept as lines of JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch

from benchmarks.optimizer_quality.problems import PROBLEMS
from benchmarks.optimizer_quality.rows import ROWS

FACTOR = math.sqrt(10)
"""Between neighbouring rates."""


@dataclasses.dataclass(frozen=True, order=True)
class Run:
    """What is trained, how long, and by what."""

    problem: str
    optimizer: str
    steps: int
    rate: float
    seed: int


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended; a loss that is not finite is infinity.

    Attributes:
        loss: on what was held out.
        train: mean over the last tenth of the steps.
        seconds: of the training.
    """

    loss: float
    train: float
    seconds: float


def rates(middle: float, trials: int) -> list[float]:
    """Return so many rates around the one in the middle, rounded to two digits."""
    return [float(f"{middle * FACTOR ** (i - trials // 2):.1e}") for i in range(trials)]


def planned(problems: Iterable[str], optimizers: Iterable[str], steps: int, trials: int, seeds: int) -> Iterator[Run]:
    """Yield all runs, each with the same number of rates and seeds."""
    optimizers = list(optimizers)
    for problem in problems:
        for optimizer in optimizers:
            for rate in rates(ROWS[optimizer].middle, trials):
                yield from (Run(problem, optimizer, steps, rate, seed) for seed in range(seeds))


def train(run: Run) -> Result:
    """Train, at a rate that falls linearly to 0."""
    torch.manual_seed(run.seed)
    task = PROBLEMS[run.problem](run.seed)
    optimizers = ROWS[run.optimizer].make(task.model, run.rate)
    schedules = [torch.optim.lr_scheduler.LambdaLR(one, lambda step: 1 - step / run.steps) for one in optimizers]
    losses, begun = [], time.perf_counter()
    for step in range(run.steps):
        task.model.zero_grad()
        loss = task.loss(step)
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            return Result(math.inf, math.inf, time.perf_counter() - begun)
        loss.backward()
        for one in (*optimizers, *schedules):
            one.step()
    seconds = time.perf_counter() - begun
    with torch.no_grad():
        held_out = float(task.held_out())
    last = losses[-max(1, run.steps // 10) :]
    return Result(held_out if math.isfinite(held_out) else math.inf, sum(last) / len(last), seconds)


def read(file: Path) -> dict[Run, Result]:
    """Return the results in a file; a line that was cut off as it was written is left out."""
    found = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            data = json.loads(line)
        except json.JSONDecodeError:
            continue
        run = Run(**{field.name: data.pop(field.name) for field in dataclasses.fields(Run)})
        found[run] = Result(**data)
    return found


def append(file: Path, run: Run, result: Result) -> None:
    """Add a result to a file."""
    begins = "\n" if file.exists() and not file.read_bytes().endswith(b"\n") and file.stat().st_size else ""
    with file.open("a", encoding="utf-8") as out:
        out.write(begins + json.dumps(dataclasses.asdict(run) | dataclasses.asdict(result)) + "\n")
