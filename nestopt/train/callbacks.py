"""Callbacks: what else happens at the steps, evaluations, checkpoints and the end of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer

from nestopt.config import Config
from nestopt.core.hookspecs import Register, hookimpl
from nestopt.core.part import Part
from nestopt.core.registry import UnknownName, registry
from nestopt.models import HopeLM
from nestopt.train.errors import TrainingError
from nestopt.train.report.metrics import read
from nestopt.train.run import Run


@dataclasses.dataclass(frozen=True)
class Moment:
    """Where a run is.

    Attributes:
        run: its folder.
        config: of the run.
        model: that is trained; of several processes, this one's part of it.
        optimizer: of the model.
        step: optimizer steps taken.
        seconds: of training.
        stop: `stop(why)` ends the run before its next step: it is measured and saved as one whose steps are done.
    """

    run: Run
    config: Config
    model: HopeLM
    optimizer: Optimizer
    step: int
    seconds: float
    stop: Callable[[str], None]

    def records(self) -> list[dict[str, Any]]:
        """Return what has been measured so far, as `metrics.jsonl` has it; in the first process."""
        return read(self.run.metrics_file)


class Callback(Part):
    """Something that happens beside training. Write those of its methods that you need; they return nothing.

    A callback without state of its own goes on exactly where its run is taken up: what was measured is in
    `moment.records()`. One that raises ends the run, by its name.
    """

    kind: ClassVar[str] = "callback"

    everywhere: ClassVar[bool] = False
    """Whether each process of a job calls it, as what uses collectives must; else the first one alone does."""

    def on_step(self, moment: Moment, loss: Tensor, norm: Tensor) -> None:
        """Take notice of a step: its loss and its gradient's norm, on the device (a `float` of them waits for it)."""

    def on_eval(self, moment: Moment, bits_per_byte: float) -> None:
        """Take notice of an evaluation on held-out text, on the way or at the end, once it is logged."""

    def on_checkpoint(self, moment: Moment, path: Path) -> None:
        """Take notice of a checkpoint; `path` is its `checkpoint.json`."""

    def on_end(self, moment: Moment, bits_per_byte: float | None) -> None:
        """Take notice of the end: the score on held-out text, or None where the run was interrupted."""


class Callbacks:
    """The callbacks of a run in this process.

    Args:
        given: all of the run.
        rank: the number of this process.
        now: gives where the run is, with what ends it.
    """

    def __init__(self, given: Sequence[Part], rank: int, now: Callable[[Callable[[str], None]], Moment]) -> None:
        self.any = bool(given)  # the same in all processes
        self.stopped: str | None = None
        self._own = [part for part in given if isinstance(part, Callback) and (rank == 0 or part.everywhere)]
        self._now = now

    def __call__(self, method: str, *args: Any) -> None:
        """Call a method of all, in their order.

        Raises:
            TrainingError: one raised; says which, of which plugin, where and what.
        """
        for part in self._own:
            moment = self._now(lambda why, part=part: self._stop(part, why))  # type: ignore[misc]
            with blamed(part, f"in {method} at step {moment.step:,}"):
                getattr(part, method)(moment, *args)

    def _stop(self, part: Callback, why: str) -> None:
        self.stopped = self.stopped or f"{part.label}: {why}"


@contextmanager
def blamed(part: Part, where: str) -> Iterator[None]:
    """Run code of a part within this: what it raises is a TrainingError that names the part and its plugin."""
    try:
        yield
    except Exception as error:
        try:
            owner = registry.owner(part.kind, part.label)
        except UnknownName:
            owner = ""  # not registered
        of = "" if not owner or owner.startswith("nestopt.") else f" of plugin {owner!r}"
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise TrainingError(f"the {part.kind} {part.label!r}{of} failed {where}: {what}") from error


class EarlyStopping(Callback):
    """End the run once the held-out text is no longer predicted better.

    Args:
        patience: evaluations that may pass without a better one. Default 3.
        by: bits per byte by which one is better. Default 0.
    """

    patience: int = 3
    by: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("patience", 1)
        self.check("by", 0.0)

    def on_eval(self, moment: Moment, bits_per_byte: float) -> None:
        best, since = float("inf"), 0
        for record in moment.records():
            if (score := record.get("eval/bits_per_byte")) is not None:
                best, since = (score, 0) if score < best - self.by else (best, since + 1)
        if since >= self.patience:
            moment.stop(f"held-out text was no better than {best:.3f} bits per byte in {since} evaluations")


@hookimpl
def nestopt_register_callbacks(register: Register) -> None:
    """Register the callbacks of this file."""
    register("early_stopping", EarlyStopping)
