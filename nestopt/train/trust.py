"""What a run's folder asks for that reaches out of it: not done for a folder of someone else's without being asked."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nestopt.config import Config, ConfigError
from nestopt.core import Part
from nestopt.train.callbacks import EarlyStopping
from nestopt.train.data.builtin import Documents, Files, Stdlib
from nestopt.train.data.parquet import is_local
from nestopt.train.data.sources import dataset_of
from nestopt.train.data.tasks import TASKS
from nestopt.train.data.tokenizer import on_disk
from nestopt.train.loggers import Csv, Jsonl, Tensorboard, Wandb

_STAYS = (
    "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping "
    "steps_per_print prescale_gradients gradient_predivide_factor sparse_gradients "
    "communication_data_type disable_allgather bf16 bfloat16 fp16 data_types zero_optimization "
    "zero_allow_untested_optimizer zero_force_ds_cpu_optimizer activation_checkpointing "
    "wall_clock_breakdown memory_breakdown dump_state"
)
"""Sections of DeepSpeed's JSON that write no files and go to no network."""

_PLACE = re.compile(r"path|file|dir|folder|url", re.IGNORECASE)


def check_trusted(
    config: Config, folder: Path, *, given: Config | None = None, text: bool = True, training: bool = False
) -> None:
    """Check that what a run's configuration asks for stays in its folder, but for reading local text.

    Args:
        config: of the folder.
        folder: of the run.
        given: what it has become by what the user has said; None is the same. What the user has said is the user's.
        text: whether its text will be read, or only its tokenizer used.
        training: whether it will be trained, with its loggers and callbacks.

    Raises:
        ConfigError: something reaches out of the folder, or the machine; says what.
    """
    given = config if given is None else given
    found = []
    if config.train.deepspeed and given.train.deepspeed == config.train.deepspeed:
        found += [f"train.deepspeed.{path} can write anywhere" for path in _reaching(config.train.deepspeed)]
    for key in ("loggers", "callbacks") if training else ():
        if getattr(given.train, key) == getattr(config.train, key):
            found += [
                f"train.{key} has {part.label}, which {_does(part)}"
                for part in getattr(config.train, key)
                if not isinstance(part, Jsonl | Csv | Tensorboard | EarlyStopping)
            ]
    if _text(given) == _text(config):
        found += _sources(config, text)
    if found:
        raise ConfigError(
            f"{folder}: {', '.join(found)}; give --trust (trust=True) if you know where this folder comes from"
        )


def _does(part: Part) -> str:
    return "sends to the network" if isinstance(part, Wandb) else "is of a plugin, and does what it wants"


def _reaching(settings: Mapping[str, Any], path: str = "") -> Iterator[str]:
    for key, value in settings.items():
        here = f"{path}{key}"
        if (not path and key not in _STAYS.split()) or (isinstance(value, str) and _PLACE.search(str(key))):
            yield here
        elif isinstance(value, Mapping):
            yield from _reaching(value, f"{here}.")


def _text(config: Config) -> tuple[object, ...]:
    return config.data.path, config.data.dataset, config.data.task


def _sources(config: Config, text: bool) -> Iterator[str]:
    if (task := config.data.task) is not None:
        if type(task) not in TASKS.values():
            yield f"data.task={task.label} is of a plugin, and reads what it wants"
        return
    dataset = dataset_of(config)
    if isinstance(dataset, Documents):
        if text and not is_local(dataset.path):
            yield f"data.dataset.path={dataset.path!r} is read from the network"
        if on_disk(dataset.tokenizer) is None:
            yield f"data.dataset.tokenizer={dataset.tokenizer!r} is fetched from the network"
    elif not isinstance(dataset, Stdlib | Files):
        yield f"data.dataset={dataset.label} is of a plugin, and reads what it wants"
