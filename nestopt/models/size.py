"""What a model takes of memory, said before any is asked for."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nestopt.config import ConfigError, ModelConfig
from nestopt.config.errors import join
from nestopt.core.part import Part
from nestopt.models.continua import continua
from nestopt.models.hope import HopeLM

LARGE = 4096
"""Numbers of a section up to this one are counted as small: weights grow with the product of two of them."""

USUAL = {"model.dim": 1024, "model.blocks": 64, "model.vocab": 32000, "model.conv": 64}
"""What these are at most in common; of all, the number that is furthest beyond is to blame."""


def check_fits(section: ModelConfig) -> None:
    """Raise ConfigError, saying how much the model's weights would take and how much there is, if that is less.

    On the device on which it would be made now; on the meta device, or as fake tensors, it takes nothing.
    """
    here = torch.empty(0)
    if type(here) is not Tensor or (there := available(here.device)) is None:
        return
    width, dim = here.element_size(), section.dim
    # the projections of a mixer are four; what else there is depends on the levels
    needed = width * (section.vocab * dim * (1 if section.tie else 2) + section.blocks * 4 * dim**2)
    numbers = dict(_numbers(section))
    if needed <= there and max(numbers.values()) > LARGE:
        needed = max(needed, width * _counted(section))
    if needed > there:
        path = max(numbers, key=lambda path: numbers[path] / USUAL.get(path, LARGE))
        refuse(path, numbers[path], "the model's weights", needed, there)


def refuse(path: str, value: object, what: str, needed: int, there: int) -> None:
    """Raise ConfigError: `what` would take more memory than there is."""
    allowed = f"{what} would take {in_words(needed)} of memory or more, and there are {in_words(there)}"
    raise ConfigError.refuse(path, value, f"{allowed}; give less")


def available(device: torch.device) -> int | None:
    """Return how many bytes can be had on a device; None where that is not known."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    found = []
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        sizes = {name: int(size.split()[0]) * 1024 for name, _, size in (line.partition(":") for line in lines)}
        found.append(sizes["MemAvailable"] + sizes.get("SwapFree", 0))
    except (OSError, KeyError, ValueError):  # not Linux
        if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
            found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):  # of a container
        try:
            found.append(int(Path("/sys/fs/cgroup", limit).read_text(encoding="ascii")))
        except (OSError, ValueError):
            continue
    return min(found, default=None)


def in_words(size: int) -> str:
    """Return `1.5 GB`."""
    for unit in ("kB", "MB", "GB", "TB", "PB"):
        size /= 1000  # type: ignore[assignment]
        if size < 1000:
            return f"{size:.3g} {unit}"
    return f"{size / 1000:.3g} EB"


def _counted(section: ModelConfig) -> int:
    """Return how many numbers the weights are, from one block of each kind."""
    mixers = section.mixers or [section.mixer]
    mlps = {id(mlp): mlp for mlp in continua(section)}
    blocks = Counter((i % len(mixers), id(mlp)) for i, mlp in enumerate(continua(section)))
    names = ("vocab", "dim", "heads", "kv_heads", "conv", "gate_output", "out_norm", "tie")
    options = {name: getattr(section, name) for name in names}
    total = 0
    with torch.device("meta"):
        for (i, which), count in blocks.items():
            try:
                model = HopeLM(blocks=1, mixer=mixers[i], mlp=mlps[which], **options)
            except RuntimeError:  # torch counts no further than 2⁶³
                return 2**62
            block = sum(p.numel() for p in model.blocks.parameters())
            total += block * count
    return total + sum(p.numel() for p in model.parameters()) - block


def _numbers(section: ModelConfig) -> Iterator[tuple[str, int]]:
    """Yield the whole numbers of a section, and those that its levels are made of, with their paths."""
    for key in ("dim", "blocks", "vocab", "conv"):
        yield f"model.{key}", getattr(section, key)
    for key in ("mixers" if section.mixers else "mixer", "mlps" if section.mlps else "mlp"):
        yield from _within(getattr(section, key), f"model.{key}")


def _within(value: Any, path: str) -> Iterator[tuple[str, int]]:
    if isinstance(value, Part):
        value = {name: getattr(value, name) for name in value.field_names}
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _within(item, join(path, key))
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _within(item, join(path, i))
    elif isinstance(value, int) and not isinstance(value, bool):
        yield path, value
