"""The run folder: what a training run leaves behind, and how to take it up again."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nestopt import models
from nestopt.config import Config, ConfigError, TrainConfig, as_saved, save
from nestopt.config.load import load_saved
from nestopt.config.schema import LATEST
from nestopt.core.part import nearest
from nestopt.core.precision import Precision, refusal
from nestopt.models import HopeLM, size
from nestopt.optim.sharded.saved import WEIGHTS
from nestopt.train.errors import CheckpointError
from nestopt.train.folder import INDEX, Hold, check_file


def locate(path: str | Path) -> Path:
    """Return where the run is that a path, a name or `latest` means (`Run.open`); the path itself where none is."""
    path = Path(path)
    for place in [path, Path(TrainConfig.model_fields["out"].default) / path] if path.parts[:-1] == () else [path]:
        if os.path.isfile(place / "config.yaml"):
            return place
        if place.name == LATEST and not os.path.lexists(place):
            made = [(os.stat(file).st_mtime_ns, file.parent) for file in place.parent.glob("*/config.yaml")]
            if made:
                return max(made)[1]
    return path


@dataclasses.dataclass(frozen=True)
class Run:
    """A folder with `config.yaml`, `metrics.jsonl`, `loss.png`, `samples.txt`, `model.safetensors` and a checkpoint
    (`checkpoint.json` and the parts that it names).
    """

    path: Path

    @classmethod
    def create(cls, config: Config) -> Run:
        """Make a new folder under `train.out`, numbered on from what is there, with the config in it."""
        root = Path(config.train.out)
        try:
            root.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise ConfigError(f"{root} can't be made, a file is in its way; give a folder", "train.out") from None
        if config.train.name is not None:
            path = root / config.train.name
            try:
                path.mkdir()
            except FileExistsError:
                raise ConfigError.refuse(
                    "train.name", path.name, f"{path} is there already; give another, or go on with it: --resume {path}"
                ) from None
            return cls._with(path, config)
        numbers = [int(found[1]) for child in root.iterdir() if (found := re.fullmatch(r"(\d+)", child.name))]
        number = max(numbers, default=0) + 1
        while True:
            path = root / f"{number:03d}"
            try:
                path.mkdir()
            except FileExistsError:  # another run began in the meantime
                number += 1
                continue
            return cls._with(path, config)

    @classmethod
    def _with(cls, path: Path, config: Config) -> Run:
        unnamed = config.model_copy(update={"train": config.train.model_copy(update={"name": None})})
        with as_saved():  # without its name, so that the file begins another run like it
            save(unnamed, path / "config.yaml")
        return cls(path)

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """Open an existing run folder. Raises ConfigError if it is none.

        Args:
            path: of the folder, or `FOLDER/latest`, which is the newest run there; what is not there is looked for in
                the folder `runs`: `latest`, `001`, or the name of a run.
        """
        run = cls(locate(path))
        if not os.path.isfile(run.config_file):  # a Path raises where a name is too long
            parent = run.path.parent
            others = [child.parent.name for child in parent.glob("*/config.yaml")] if os.path.isdir(parent) else []
            raise ConfigError(f"{run.path} is not a run: it has no config.yaml.{nearest(run.path.name, others)}")
        return run

    def check_own(self) -> None:
        """Check that whatever a run writes here stays here.

        Raises:
            CheckpointError: a link is in the place of a file, or anything but a file; or a file that would be written
                to as it lies there has another name elsewhere.
        """
        for path in (self.metrics_file, self.samples_file):
            check_file(path, alone=True)
        for path in (self.path / name for name in ("tensorboard", "wandb")):
            if os.path.islink(path) or (os.path.lexists(path) and not path.is_dir()):
                raise CheckpointError(f"{path}: is no folder of the run's own; have a folder there, or nothing")
        names = (
            "metrics.csv",
            "wandb.id",
            "config.yaml",
            "loss.png",
            "compare.png",
            "compare.json",
            "model.safetensors",
            INDEX,
        )
        for path in [*(self.path / name for name in names), *self.path.glob("checkpoint-*")]:
            check_file(path, own=True)

    def hold(self) -> Hold:
        """Take the right to write here. Raises CheckpointError where another run has it."""
        return Hold(self.path, self.config_file)

    @property
    def begun(self) -> bool:
        """Whether there is something to go on from: without, a run was stopped before its first checkpoint."""
        later = [path for path in self.path.glob("checkpoint-*") if not path.name.startswith("checkpoint-1-")]
        return (self.path / INDEX).exists() or self.model_file.exists() or bool(later)

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def samples_file(self) -> Path:
        return self.path / "samples.txt"

    @property
    def model_file(self) -> Path:
        return self.path / "model.safetensors"

    def config(self) -> Config:
        """Return the configuration the run was started with."""
        check_file(self.config_file)
        return load_saved(self.config_file)

    def save_model(self, weights: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """Write `model.safetensors`: weights by name, readable by any safetensors reader."""
        from nestopt.train.checkpoints import file as checkpoint

        checkpoint.save(self.model_file, weights, meta)

    def load_model(self, device: torch.device | str = "cpu", precision: Precision | None = None) -> HopeLM:
        """Load the trained model; while the run has not ended, that of its checkpoint.

        Args:
            device: where it is to be.
            precision: of the products of its memories; None is as it was trained.

        Raises:
            CheckpointError: there is neither, or it can't be read.
            ConfigError: a precision that the device lacks.
        """
        from nestopt.train.checkpoints.shards import put_weights

        config = self.config()
        if precision is not None:
            config.model.precision = precision
        check_precision(config, torch.device(device), "precision='float32', or --precision float32")
        model = build_model(config)
        put_weights(model, *weights_from(self.path))
        return model.to(device).eval()


def weights_from(path: str | Path) -> tuple[dict[str, Tensor], Path]:
    """Return weights by name, and the file that says which.

    Args:
        path: of a run's folder (its trained model; while it has not ended, its checkpoint), of a `checkpoint.json`, or
            of a safetensors file.

    Raises:
        CheckpointError, ConfigError: there is none, or it can't be read.
    """
    from nestopt.train.checkpoints import file as checkpoint
    from nestopt.train.checkpoints.shards import ShardReader

    path = locate(path)
    if path.is_dir():
        run = Run.open(path)
        path = run.model_file if run.model_file.exists() else run.path / INDEX
    if path.suffix == ".json":
        with ShardReader(path) as parts:
            keys = [key for key in parts.keys() if key.startswith(WEIGHTS)]  # noqa: SIM118 (not a dict)
            return {key.removeprefix(WEIGHTS): parts.whole(key) for key in keys}, path
    with checkpoint.opened(path) as file:
        header: dict[str, str] = file.metadata() or {}
        meta: dict[str, Any] = {}
        if header.get("format") == checkpoint.FORMAT:
            meta, sums = checkpoint.read_header(path, header)
            checkpoint.compare(path, file, sums)
        if "stretches" in meta:
            raise CheckpointError(f"{path}: is a part of a checkpoint; give the checkpoint*.json that names it")
        return {name: file.get_tensor(name) for name in file.keys()}, path  # noqa: SIM118 (not a dict)


def check_precision(config: Config, device: torch.device, how: str = "model.precision=float32") -> None:
    """Raise ConfigError if the memories of the configuration's model can't have their precision on `device`.

    `how` says where another one can be given.
    """
    precision = config.model.precision
    if problem := refusal(precision, device, getattr(torch, config.train.dtype)):
        raise ConfigError.refuse("model.precision", precision, f"{problem}; give float32 ({how})")


def check_batch(config: Config, world: int, device: torch.device) -> None:
    """Raise ConfigError, saying how much it would take, where a process's share of a batch does not fit in memory.

    What is counted is what must be there: the batch's tokens, and of a micro-batch what each block adds to.
    """
    data, train, model = config.data, config.train, config.model
    tokens, kept = data.batch // world * data.window, 1 if model.segment else model.blocks
    stream = kept * model.dim * getattr(torch, train.dtype).itemsize
    for at, needed in ((device, tokens * stream // train.accumulate), (torch.device("cpu"), tokens * 8)):
        there = size.available(at)
        if there is not None and needed > there:
            given = {"data.batch": (data.batch, 8), "data.window": (data.window, 128), "model.dim": (model.dim, 1024)}
            key = max(given, key=lambda key: given[key][0] / given[key][1])
            size.refuse(key, given[key][0], f"a step of {tokens:,} tokens", needed, there)


def build_model(config: Config) -> HopeLM:
    """Build the model of a configuration, in its dtype, at its seed's initial weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        model = models.build_model(config.model)
    return model.to(getattr(torch, config.train.dtype))


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
        run: its folder.
        step: optimizer steps taken in all.
        seconds: of training, in all.
        bits_per_byte: on the held-out text, or None where the run was interrupted.
        baselines: those of simple models on the same text; in the first process only.
        finished: False if it was interrupted (its checkpoint is saved, and `train(resume=…)` goes on).
        ended: what ended it: its steps, its time or a signal.
    """

    run: Run
    step: int
    seconds: float
    bits_per_byte: float | None
    baselines: dict[str, float]
    finished: bool
    ended: str
