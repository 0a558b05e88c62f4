"""How the work of a step is shared: one process, or several."""

from __future__ import annotations

from nestopt.config import Config, ConfigError
from nestopt.train.engines import launch
from nestopt.train.engines.ddp import Ddp
from nestopt.train.engines.engine import Engine

__all__ = ["Ddp", "Engine", "make"]


def make(config: Config) -> Engine:
    """Make the engine that `train.engine` names.

    Raises:
        ConfigError: several processes were started for an engine of one, or the engine lacks what the config asks for.
    """
    name = config.train.engine
    if name == "single" and launch.processes() > 1:
        raise ConfigError.refuse(
            "train.engine", "single", f"{launch.processes()} processes were started; give ddp, fsdp2 or deepspeed"
        )
    if name == "fsdp2":
        from nestopt.train.engines.fsdp2 import Fsdp2

        return Fsdp2(config)
    if name == "deepspeed":
        from nestopt.train.engines.deepspeed import DeepSpeed

        return DeepSpeed(config)
    return Ddp(config) if name == "ddp" else Engine(config)
