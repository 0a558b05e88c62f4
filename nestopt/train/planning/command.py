"""`nestopt plan --gpus`: from flags to the text of a plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nestopt.config import Config, ConfigError
from nestopt.train.planning.ranks import simulate
from nestopt.train.planning.scale import Gpu, scale
from nestopt.train.planning.sharing import Sharing
from nestopt.train.planning.text import ranks_table, scale_table


def answer(config: Config, flags: Mapping[str, Any]) -> str:
    """The plan that was asked for.

    Args:
        config: the run.
        flags: those that were given, by name.

    Raises:
        ConfigError: a flag that does not go with the others, or its value.
    """
    if "gpus" not in flags:
        name = next(iter(flags))
        raise ConfigError.refuse(f"--{name}", flags[name], "it is about a run on many GPUs; give --gpus too")
    for name in {"periods", "check"} & flags.keys():
        raise ConfigError.refuse(f"--{name}", flags[name], "it compares levels on this machine; leave out --gpus")
    sharing = Sharing.of(config, flags["gpus"], flags.get("engine"), flags.get("zero"))
    machine = {name: flags[name] for name in ("tflops", "mfu", "memory") if name in flags}
    if not flags.get("ranks"):
        return scale_table(scale(config, sharing, Gpu(**machine), tokens=flags.get("tokens")))
    for name in {*machine, *({"tokens"} & flags.keys())}:
        raise ConfigError.refuse(f"--{name}", flags[name], "--ranks tells no times; leave out one of them")
    return ranks_table(simulate(config, sharing))
