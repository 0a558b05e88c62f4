"""Loggers: where a run's measurements go. In a job of several processes the first one alone has them."""

from __future__ import annotations

import copy
import csv
import os
import time
import uuid
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import IO, Any, ClassVar, Literal

from nestopt.config import Config
from nestopt.config.files import replacing
from nestopt.core.hookspecs import Register, hookimpl
from nestopt.core.part import Part
from nestopt.train.callbacks import blamed
from nestopt.train.errors import damaged, extra
from nestopt.train.folder import appending, check_file, saying
from nestopt.train.report.metrics import MetricsLog, read
from nestopt.train.run import Run

Record = Mapping[str, Any]
"""What is measured at once: `step`, `seconds` (of training), and names such as `train/loss` with numbers."""


class Logger(Part):
    """A place for a run's measurements."""

    kind: ClassVar[str] = "logger"

    def require(self) -> None:
        """Import what it needs, before there is a run. Raises MissingExtra where that is not installed."""

    @abstractmethod
    def begin(self, run: Run, config: Config, records: Sequence[Record]) -> None:
        """Open it.

        Args:
            run: its folder.
            config: of the run.
            records: what was measured before, where a run is taken up. Of what came after its checkpoint, which will be
                measured again, it has nothing, and neither should this logger from now on.
        """

    @abstractmethod
    def log(self, record: Record) -> None:
        """Take one record, and keep it even if the process is killed right after."""

    def close(self) -> None:
        """End it, also where the run has failed."""


class Loggers:
    """All loggers of a run, which are told the same.

    Args:
        run: its folder.
        config: names them; `jsonl` is always there.
        step: where the run goes on: what was measured after it is forgotten.
        again: what is measured again at that step itself; None for nothing.

    Raises:
        CheckpointError: anything but a file is where one will be written.
        TrainingError: one of a plugin failed; says which.
    """

    def __init__(self, run: Run, config: Config, step: int, again: str | None) -> None:
        self.path = run.metrics_file
        with damaged(self.path), MetricsLog(self.path) as log:
            log.truncate_after(step, again=again)
        records = read(self.path)
        self._open: list[Logger] = []
        try:
            for part in of(config):
                with _named(part, "as the run began"):
                    part.begin(run, config, records)
                self._open.append(part)
        except BaseException:
            self.close()
            raise

    def append(self, record: Record) -> None:
        """Give a record to all."""
        for part in self._open:
            with _named(part, f"at step {record['step']:,}"):
                part.log(record)

    def close(self) -> None:
        """Close all."""
        while self._open:
            part = self._open.pop()
            with _named(part, "as the run ended"):
                part.close()


def of(config: Config) -> list[Logger]:
    """Return the loggers of a configuration, `jsonl` first, as objects of one run's own."""
    given = [part for part in config.train.loggers if isinstance(part, Logger)]
    return [Jsonl(), *(copy.copy(part) for part in given if not isinstance(part, Jsonl))]


def _named(part: Logger, where: str) -> Any:
    """Name a plugin's logger where it fails; nestopt's own say by themselves what is wrong."""
    return nullcontext() if type(part).__module__ == __name__ else blamed(part, where)


class Jsonl(Logger):
    """`metrics.jsonl`: a line of JSON a record. Every run has it."""

    def begin(self, run: Run, config: Config, records: Sequence[Record]) -> None:
        self._log = MetricsLog(run.metrics_file)

    def log(self, record: Record) -> None:
        self._log.append(record)

    def close(self) -> None:
        self._log.close()


class Csv(Logger):
    """`metrics.csv`: a row a record, a column a name, for spreadsheets and pandas."""

    def begin(self, run: Run, config: Config, records: Sequence[Record]) -> None:
        self._path = run.path / "metrics.csv"
        self._write(records)

    def _write(self, records: Iterable[Record]) -> None:
        """Write all rows anew, with the columns that they need."""
        rows = list(records)
        self._names = list(dict.fromkeys(name for row in rows for name in row))
        check_file(self._path, own=True)
        with replacing(self._path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
            self._writer(file).writeheader()
            self._writer(file).writerows(rows)
        self._file = appending(self._path)

    def _writer(self, file: IO[str]) -> csv.DictWriter[str]:
        return csv.DictWriter(file, self._names, lineterminator="\n")

    def log(self, record: Record) -> None:
        if record.keys() <= set(self._names):
            with saying(self._path):
                self._writer(self._file).writerow(record)
                self._file.flush()
            return
        self.close()
        with open(self._path, encoding="utf-8", newline="") as file:
            rows: list[Record] = list(csv.DictReader(file))
        self._write([*rows, record])

    def close(self) -> None:
        with saying(self._path):
            self._file.close()


class Tensorboard(Logger):
    """Event files for TensorBoard in the run's folder `tensorboard`: `tensorboard --logdir runs`. Needs the extra
    `tensorboard`. The clock of its plots is the time of training.
    """

    def require(self) -> None:
        with extra("tensorboard"):
            import torch.utils.tensorboard  # noqa: F401

    def begin(self, run: Run, config: Config, records: Sequence[Record]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = run.path / "tensorboard"
        before = list(folder.glob("events.out.tfevents.*"))
        self._begun = time.time() - (records[-1].get("seconds", 0.0) if records else 0.0)
        with saying(folder):
            self._writer = SummaryWriter(str(folder))
            self._writer.add_text("config", f"```yaml\n{config.to_yaml()}```")
            for record in records:  # anew, so that nothing is there twice, whichever way it is read
                self._add(record)
            self._writer.flush()
            for path in before:
                path.unlink()

    def _add(self, record: Record) -> None:
        at = self._begun + record.get("seconds", 0.0)
        for name, value in record.items():
            if name not in ("step", "seconds") and isinstance(value, int | float):
                self._writer.add_scalar(name, value, record["step"], walltime=at)

    def log(self, record: Record) -> None:
        self._add(record)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Wandb(Logger):
    """Weights & Biases. Needs the extra `wandb`. A run that is taken up goes on with the same run there.

    Args:
        project: its name there.
        entity: the user or team; null is the default one.
        mode: `online`, `offline` (kept in the run's folder, for `wandb sync`), or `disabled`.
    """

    project: str = "nestopt"
    entity: str | None = None
    mode: Literal["online", "offline", "disabled"] = "online"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choice("mode", ["online", "offline", "disabled"])

    def require(self) -> None:
        with extra("wandb"):
            import wandb  # noqa: F401

    def begin(self, run: Run, config: Config, records: Sequence[Record]) -> None:
        import wandb

        file = run.path / "wandb.id"
        check_file(file, own=True)
        if not file.exists():
            with replacing(file) as temporary:
                temporary.write_text(uuid.uuid4().hex[:12], encoding="ascii")
        self._run = wandb.init(
            project=self.project,
            entity=self.entity,
            mode=self.mode,
            id=file.read_text(encoding="ascii"),
            name=run.path.name,
            dir=os.fspath(run.path),
            config=config.to_data(),
            resume="allow",
        )

    def log(self, record: Record) -> None:
        # a step that is there already, as after a crash, is refused there: it was measured alike
        self._run.log({name: value for name, value in record.items() if name != "step"}, step=record["step"])

    def close(self) -> None:
        self._run.finish()


@hookimpl
def nestopt_register_loggers(register: Register) -> None:
    """Register the loggers of this file."""
    register("jsonl", Jsonl)
    register("csv", Csv)
    register("tensorboard", Tensorboard)
    register("wandb", Wandb)
