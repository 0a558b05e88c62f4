"""Runs of a problem by an optimizer: how one is made, which are made, and how they are kept as lines of JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.optimizer_quality.problems import PROBLEMS
from benchmarks.optimizer_quality.rows import ROWS, Option, Setting

FACTOR = math.sqrt(10)
"""Between neighbouring rates of the sweep; once the best is known, half of that."""

DECAY = 1e-3
"""The decay of weights that all are tried with."""

TUNING = 0
"""The seed of the runs that settings are chosen by; those reported have the seeds from 1."""

WARMUP = 0.05
"""The part of the steps in which the rate rises to its largest."""


@dataclasses.dataclass(frozen=True, order=True)
class Run:
    """What is trained, how long, and by what.

    Attributes:
        options: the decay of weights, and the optimizer's own, as sorted pairs.
    """

    problem: str
    optimizer: str
    steps: int
    rate: float
    options: tuple[tuple[str, float], ...] = ()
    seed: int = TUNING

    def but(self, **options: float) -> Run:
        """Return the same run with other options."""
        return dataclasses.replace(self, options=tuple(sorted((dict(self.options) | options).items())))


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended; a loss that is not finite is infinity.

    Attributes:
        validation: loss on what settings are chosen by.
        test: loss on what is reported.
        train: mean over the last tenth of the steps.
        seconds: CPU time of the training.
    """

    validation: float
    test: float
    train: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Cost:
    """What an optimizer costs on a problem.

    Attributes:
        milliseconds: CPU time of a step with its forward and backward pass, the median over rounds.
        ratio: of that to the first row's, the median over rounds in which both were timed.
        bytes: of state, a parameter.
    """

    milliseconds: float
    ratio: float
    bytes: float


class Search:
    """The runs of a search, with the tuning seed, and the best of them on validation."""

    def __init__(self, result: Callable[[Run], Result]) -> None:
        self._result = result
        self._tried: dict[Run, float] = {}

    def attempt(self, run: Run) -> None:
        self._tried[run] = self._result(run).validation

    @property
    def best(self) -> Run:
        """Of several that diverge, the one with the smallest rate."""
        return min(self._tried, key=lambda run: (self._tried[run], run.rate))

    def rates(self, first: Run, trials: int) -> None:
        """Try so many rates around that of a run, and one more at a time while the best is at the edge."""
        low, high = -(trials // 2), trials - trials // 2 - 1
        for i in range(low, high + 1):
            self.attempt(_times(first, FACTOR**i))
        for _ in range(8):
            if self.best == _times(first, FACTOR**low):
                low -= 1
                self.attempt(_times(first, FACTOR**low))
            elif self.best == _times(first, FACTOR**high):
                high += 1
                self.attempt(_times(first, FACTOR**high))


def _times(run: Run, factor: float) -> Run:
    """Return the same run at a larger rate, of two digits."""
    return dataclasses.replace(run, rate=float(f"{run.rate * factor:.2g}"))


def search(first: Run, own: tuple[Option, Option], trials: int, result: Callable[[Run], Result]) -> Run:
    """Return the run that is best on validation, of the tuning seed.

    Tried are rates around that of `first`, two between the best and its neighbours, and then, with what was best so
    far, some decay of the weights and two options of its own.
    """
    search = Search(result)
    search.rates(first, trials)
    middle = search.best
    for factor in (FACTOR**-0.5, FACTOR**0.5):
        search.attempt(_times(middle, factor))
    for option in ({"decay": DECAY}, *own):
        search.attempt(search.best.but(**option))
    return search.best


def search_in_time(best: Run, cost: Cost, trials: int, result: Callable[[Run], Result]) -> Run:
    """Return the run that is best with the steps that fit into the first row's time, at a rate that is found anew.

    Where it takes that time but for 3 %, the run is the same.
    """
    if abs(cost.ratio - 1) < 0.03:
        return best
    steps = max(1, round(best.steps / cost.ratio))
    search = Search(result)
    search.rates(dataclasses.replace(best, steps=steps), trials)
    return search.best


def repeated(run: Run, seeds: int) -> list[Run]:
    """Return the runs that are reported of a setting."""
    return [dataclasses.replace(run, seed=seed) for seed in range(TUNING + 1, TUNING + 1 + seeds)]


def setting(run: Run, model: torch.nn.Module) -> Setting:
    options = dict(run.options)
    shared = {name: options.pop(name) for name in ("decay", "rest") if name in options}
    return Setting(model, run.rate, options=options, **shared)


def train(run: Run) -> Result:
    """Train, at a rate that rises for a twentieth of the steps and falls linearly to 0, or stays where it is."""
    torch.manual_seed(run.seed)
    task, row = PROBLEMS[run.problem](run.seed), ROWS[run.optimizer]
    optimizers = row.make(setting(run, task.model))
    warmup = max(1, round(WARMUP * run.steps))

    def share(step: int) -> float:
        falling = (run.steps - step) / (run.steps - warmup) if row.falls else 1.0
        return min((step + 1) / warmup, falling)

    schedules = [torch.optim.lr_scheduler.LambdaLR(one, share) for one in optimizers]
    losses, begun = [], time.process_time()
    for step in range(run.steps):
        task.model.zero_grad()
        loss = task.loss(step)
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            return Result(math.inf, math.inf, math.inf, time.process_time() - begun)
        loss.backward()
        for one in (*optimizers, *schedules):
            one.step()
    seconds = time.process_time() - begun
    for one in optimizers:
        getattr(one, "eval", lambda: None)()  # those that evaluate other weights than they train
    with torch.no_grad():
        held_out = [float(loss()) for loss in (task.validation, task.test)]
    last = losses[-max(1, run.steps // 10) :]
    validation, test = held_out if all(map(math.isfinite, held_out)) else (math.inf, math.inf)
    return Result(validation, test, sum(last) / len(last), seconds)


# -- the file ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Found:
    """What is known already: results by run, costs by problem and optimizer."""

    results: dict[Run, Result] = dataclasses.field(default_factory=dict)
    costs: dict[tuple[str, str], Cost] = dataclasses.field(default_factory=dict)


def read(file: Path) -> Found:
    """Return what is in a file; a line that was cut off as it was written is left out."""
    found = Found()
    for data in _lines(file):
        if "seed" in data:
            data["options"] = tuple(sorted(data["options"].items()))
            run = Run(**{field.name: data.pop(field.name) for field in dataclasses.fields(Run)})
            found.results[run] = Result(**data)
        else:
            name = data.pop("problem"), data.pop("optimizer")
            found.costs[name] = Cost(**data)
    return found


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def append(file: Path, run: Run, result: Result) -> None:
    """Add a result to a file."""
    _append(file, dataclasses.asdict(run) | {"options": dict(run.options)}, dataclasses.asdict(result))


def append_cost(file: Path, problem: str, optimizer: str, cost: Cost) -> None:
    """Add a cost to a file."""
    _append(file, {"problem": problem, "optimizer": optimizer}, dataclasses.asdict(cost))


def _append(file: Path, name: Mapping[str, Any], values: Mapping[str, float]) -> None:
    begins = "\n" if file.exists() and not file.read_bytes().endswith(b"\n") and file.stat().st_size else ""
    rounded = {key: float(f"{value:.5g}") for key, value in values.items()}
    with file.open("a", encoding="utf-8") as out:
        out.write(begins + json.dumps({**name, **rounded}) + "\n")
