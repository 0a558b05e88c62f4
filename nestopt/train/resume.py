"""What a run that is taken up must have as it was, and what it finds in its checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nestopt.config import Config, ConfigError
from nestopt.train.checkpoints.file import opened, read_header
from nestopt.train.checkpoints.shards import ShardReader
from nestopt.train.errors import damaged
from nestopt.train.run import Run


def fixed(config: Config) -> dict[str, Any]:
    """Return what of a configuration stays when its run is taken up, besides what names and shapes in it tell."""
    data, settings = config.data, config.train
    return {
        "train.dtype": settings.dtype,
        "train.seed": settings.seed,
        "data.window": data.window,
        "data.batch": data.batch,
    }


def check_fixed(config: Config, saved: Mapping[str, Any], reset: bool) -> None:
    """Check that a run goes on with what it was saved with.

    Args:
        config: of the run that goes on.
        saved: what `fixed` gave.
        reset: whether its data are begun anew, so that those keys may be others.

    Raises:
        ConfigError: one is another; says what to give.
    """
    for key, value in fixed(config).items():
        if value != saved[key] and (key == "train.dtype" or not reset):
            how = "begin a new run with its weights: --init-from RUN"
            if key != "train.dtype":
                how = "begin its data anew: --reset-data"
            raise ConfigError.refuse(key, value, f"the run was saved with {saved[key]}; give that, or {how}")


def saved_random_state(parts: ShardReader, begin: str, rank: int) -> dict[str, Tensor]:
    """Return the generators' states of a process, whose names begin so; of the first where it was not there then."""
    keys = list(parts.keys())
    mine = f"{begin}{rank}."
    prefix = mine if any(key.startswith(mine) for key in keys) else f"{begin}0."
    return {key.removeprefix(prefix): parts.whole(key) for key in keys if key.startswith(prefix)}


def score_at(run: Run, step: int) -> float | None:
    """Return the score of a run that has ended at this step; None where it has not been measured there."""
    path = run.model_file
    if not path.exists():
        return None
    with opened(path) as file, damaged(path):
        meta, _ = read_header(path, file.metadata() or {})
        return float(meta["bits_per_byte"]) if meta["step"] == step else None
