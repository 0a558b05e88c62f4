"""`nestopt plan --gpus`: from flags to the text of a plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from nestopt.config import Config, ConfigError
from nestopt.train.planning.ranks import simulate
from nestopt.train.planning.rates import Rates, measure
from nestopt.train.planning.scale import GIGA, Gpu, scale
from nestopt.train.planning.sharing import Sharing
from nestopt.train.planning.text import ranks_table, scale_table

STATED = ("tflops", "bandwidth", "launch", "share")
"""Flags about what a data sheet says."""


def answer(config: Config, flags: Mapping[str, Any]) -> str:
    """Return the plan that was asked for.

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
    if flags.get("ranks"):
        for name in {"memory", "rates", "tokens", *STATED} & flags.keys():
            raise ConfigError.refuse(f"--{name}", flags[name], "--ranks tells no times; leave out one of them")
        return ranks_table(simulate(config, sharing))
    return scale_table(scale(config, sharing, _gpu(flags), tokens=flags.get("tokens"), quiet=False))


def _gpu(flags: Mapping[str, Any]) -> Gpu:
    """Return the GPU that the flags describe; without any, that of this machine, or else an H100."""
    stated = {name: flags[name] for name in STATED if name in flags}
    source = flags.get("rates", "stated" if stated or not torch.cuda.is_available() else "measured")
    if source == "stated":
        if "tflops" in stated:
            stated["tflops"] = _peaks(stated["tflops"])
        return Gpu(flags.get("memory", 80.0), Rates.stated(**stated))
    for name, value in stated.items():
        allowed = f"it is about peaks of a data sheet; leave it out, or give --rates stated, not {source}"
        raise ConfigError.refuse(f"--{name}", value, allowed)
    if source != "measured":
        return Gpu(flags.get("memory", 80.0), Rates.read(source))
    if not torch.cuda.is_available():
        raise ConfigError.refuse("--rates", source, "there is no CUDA device here; give stated, or a JSON file")
    memory = torch.cuda.get_device_properties("cuda").total_memory / GIGA
    return Gpu(flags.get("memory", memory), measure("cuda"))


def _peaks(text: str) -> dict[str, float]:
    """Return `bfloat16=312,float32=19.5` by dtype."""
    found = {}
    for item in text.split(","):
        dtype, _, number = item.partition("=")
        try:
            found[dtype.strip()] = float(number)
        except ValueError:
            allowed = "give 10¹² operations a second by dtype, such as bfloat16=312,tf32=156,float32=19.5"
            raise ConfigError.refuse("--tflops", text, allowed) from None
    return found
