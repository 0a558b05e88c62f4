"""DeepSpeed's JSON: what of it is ours to say, and what is refused."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nestopt.config import Config, ConfigError
from nestopt.config.files import nearest_file

AUTO = "auto"
"""In the JSON, "as nestopt says"."""

_REFUSED: dict[str, str] = {
    "optimizer": "the levels are the optimizer; leave it out, and give the spec (in a config: the section optimizer)",
    "amp": "give bf16 or fp16 in its place",
    "torch_autocast": "give bf16 or fp16 in its place",
    "zero_optimization.zenflow": "it steps with an optimizer of its own; leave it out",
    "zero_optimization.zero_hpz_partition_size": "weights are cut up in two ways then; leave it out",
    "zero_optimization.mics_shard_size": "weights are cut up in two ways then; leave it out",
    "bf16.bf16_master_weights_and_grads": "levels keep their states, and weights for them, in float32; leave it out",
    "bf16.bf16_optimizer_states": "levels keep their states in float32; leave it out",
    "fp16.fp16_master_weights_and_grads": "levels keep their states, and weights for them, in float32; leave it out",
    "fp16.fp16_optimizer_states": "levels keep their states in float32; leave it out",
    "sequence_parallel_size": "sequences are not cut up; leave it out",
    "tensor_parallel": "matrices are not cut up in two ways; leave it out",
}

_SECTIONS = (
    "zero_optimization",
    "zero_optimization.offload_optimizer",
    "zero_optimization.offload_param",
    "zero_optimization.zenflow",
    "bf16",
    "fp16",
    "optimizer",
    "scheduler",
    "amp",
    "torch_autocast",
    "tensor_parallel",
    "activation_checkpointing",
    "aio",
    "comms_logger",
    "compile",
    "compression_training",
    "curriculum_learning",
    "data_efficiency",
    "data_types",
    "elasticity",
    "flops_profiler",
    "checkpoint",
    "csv_monitor",
    "tensorboard",
    "wandb",
)
"""Keys that hold mappings, outer ones first."""


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the JSON of a file.

    Raises:
        ConfigError: there is no such file, or it is no JSON object; says where.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        hint = nearest_file(Path(path), [".json"])
        raise ConfigError.refuse("--deepspeed", str(path), f"it can't be read: {error.strerror}.{hint}") from None
    except ValueError as error:
        raise ConfigError.refuse("--deepspeed", str(path), f"it is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError.refuse("--deepspeed", str(path), "give a JSON object, {…}")
    return found


def checked(given: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return a copy of `given` with what DeepSpeed would set by itself, and must be otherwise, set.

    Raises:
        ConfigError: for what can't be; `key` is what `given` is called.
    """
    settings = copy.deepcopy(dict(given))
    _check_sections(settings, key)
    for path, why in _REFUSED.items():
        value = _at(settings, path)
        if value not in (None, False, {}, 1) and not (isinstance(value, Mapping) and value.get("enabled") is False):
            raise ConfigError.refuse(f"{key}.{path}", value, why)
    for part in ("offload_optimizer", "offload_param"):
        if _at(settings, f"zero_optimization.{part}.device") == "nvme":
            raise ConfigError.refuse(
                f"{key}.zero_optimization.{part}.device",
                "nvme",
                "what is swapped out can't be stepped; give cpu or none",
            )
    settings["zero_allow_untested_optimizer"] = True
    settings["zero_force_ds_cpu_optimizer"] = False
    if settings.get("gradient_clipping", AUTO) == AUTO:
        settings["gradient_clipping"] = 0.0  # DeepSpeed's own default is to clip at 1
    settings.setdefault("steps_per_print", 2**31 - 1)
    return settings


def _check_sections(settings: dict[str, Any], key: str) -> None:
    """Drop sections that are null or, where none may be, false; raise ConfigError for others that are no mappings."""
    for path in _SECTIONS:
        *above, last = path.split(".")
        owner = _at(settings, ".".join(above)) if above else settings
        if not isinstance(owner, dict) or last not in owner:
            continue
        if owner[last] is None or (owner[last] is False and path in _REFUSED):
            del owner[last]
        elif not isinstance(owner[last], Mapping):
            raise ConfigError.refuse(f"{key}.{path}", owner[last], "give a mapping, {…}")
    stage_of(settings, key)


def stage_of(settings: Mapping[str, Any], key: str = "train.deepspeed") -> int:
    """Return the ZeRO stage that settings ask for. Raises ConfigError for one that there is not."""
    section = settings.get("zero_optimization")
    if not isinstance(section, Mapping | None):
        raise ConfigError.refuse(f"{key}.zero_optimization", section, "give a mapping, {…}")
    stage = (section or {}).get("stage")
    if stage is None or stage == AUTO:
        return 0
    if type(stage) is not int or not 0 <= stage <= 3:
        raise ConfigError.refuse(f"{key}.zero_optimization.stage", stage, f'give 0, 1, 2, 3 or "{AUTO}"')
    return stage


def merged(config: Config, world: int) -> dict[str, Any]:
    """Return the settings of a run: its JSON, and what its config says.

    Raises:
        ConfigError: both say something, and not the same; says what to change.
    """
    given = copy.deepcopy(config.train.deepspeed or {})
    _check_sections(given, "train.deepspeed")
    train, batch = config.train, config.data.batch
    stage = stage_of(given) if train.zero_stage is None else int(train.zero_stage)
    for path, ours, key in _ours(config, batch, world, stage):
        value = _at(given, path)
        if value not in (None, AUTO, ours):
            raise ConfigError.refuse(
                f"train.deepspeed.{path}",
                value,
                f'{key} says {ours}; make them the same, or leave it out of the JSON (or write "{AUTO}")',
            )
        _set(given, path, ours)
    if given.get("scheduler") not in (None, {}):
        raise ConfigError.refuse(
            "train.deepspeed.scheduler",
            given["scheduler"],
            "train.warmup and train.decay are the schedule; leave it out",
        )
    return checked(given, "train.deepspeed")


def _ours(config: Config, batch: int, world: int, stage: int) -> Iterator[tuple[str, Any, str]]:
    """Yield what the config says: where in the JSON, its value, and by which key."""
    train = config.train
    yield "train_batch_size", batch, "data.batch"
    yield "gradient_accumulation_steps", train.accumulate, "train.accumulate"
    micro = batch // (world * train.accumulate)
    yield "train_micro_batch_size_per_gpu", micro, f"data.batch, in {world} processes times train.accumulate,"
    yield "gradient_clipping", train.clip or 0.0, "train.clip"
    yield "zero_optimization.stage", stage, "train.zero_stage"
    yield "bf16.enabled", train.dtype == "bfloat16", "train.dtype"
    yield "fp16.enabled", train.dtype == "float16", "train.dtype"


def _at(settings: Mapping[str, Any], path: str) -> Any:
    found: Any = settings
    for key in path.split("."):
        if not isinstance(found, Mapping):
            return None
        found = found.get(key)
    return found


def _set(settings: dict[str, Any], path: str, value: Any) -> None:
    *sections, last = path.split(".")
    for key in sections:
        settings = settings.setdefault(key, {})
    settings[last] = value
