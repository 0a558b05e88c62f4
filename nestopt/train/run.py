"""The run folder: what a training run leaves behind, and how to take it up again."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nestopt import models
from nestopt.config import Config, ConfigError, as_saved, load, save
from nestopt.core.part import nearest
from nestopt.core.precision import Precision, refusal
from nestopt.models import HopeLM
from nestopt.optim.sharded.saved import WEIGHTS


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
        root.mkdir(parents=True, exist_ok=True)
        numbers = [int(found[1]) for child in root.iterdir() if (found := re.fullmatch(r"(\d+)", child.name))]
        number = max(numbers, default=0) + 1
        while True:
            path = root / f"{number:03d}"
            try:
                path.mkdir()
            except FileExistsError:  # another run began in the meantime
                number += 1
                continue
            with as_saved():
                save(config, path / "config.yaml")
            return cls(path)

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """Open an existing run folder. Raises ConfigError if it is none."""
        run = cls(Path(path))
        if not run.config_file.is_file():
            parent = run.path.parent
            others = [str(parent / child.name) for child in parent.iterdir()] if parent.is_dir() else []
            raise ConfigError(f"{run.path} is not a run: it has no config.yaml.{nearest(str(run.path), others)}")
        return run

    @property
    def config_file(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics_file(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def model_file(self) -> Path:
        return self.path / "model.safetensors"

    def config(self) -> Config:
        """Return the configuration the run was started with."""
        with as_saved():
            config = load(self.config_file)
        assert isinstance(config, Config)
        return config

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
        from nestopt.train.checkpoints import file as checkpoint
        from nestopt.train.checkpoints.shards import ShardReader, load_weights

        config = self.config()
        if precision is not None:
            config.model.precision = precision
        check_precision(config, torch.device(device), "precision='float32', or --precision float32")
        model = build_model(config)
        if self.model_file.exists():
            weights, _ = checkpoint.load(self.model_file)
            model.load_state_dict(weights)
        else:
            with ShardReader(self.path) as parts:
                load_weights(model, parts, WEIGHTS)
        return model.to(device).eval()


def check_precision(config: Config, device: torch.device, how: str = "model.precision=float32") -> None:
    """Raise ConfigError if the memories of the configuration's model can't have their precision on `device`.

    `how` says where another one can be given.
    """
    precision = config.model.precision
    if problem := refusal(precision, device, getattr(torch, config.train.dtype)):
        raise ConfigError.refuse("model.precision", precision, f"{problem}; give float32 ({how})")


def build_model(config: Config) -> HopeLM:
    """Build the model of a configuration, in its dtype, at its seed's initial weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        model = models.build_model(config.model)
    return model.to(getattr(torch, config.train.dtype))
