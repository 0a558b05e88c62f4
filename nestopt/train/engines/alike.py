"""What must be the same in all processes of a run, by key."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator
from typing import Any

import torch

from nestopt._version import VERSION
from nestopt.config import Config
from nestopt.config.errors import join
from nestopt.core.registry import registry

OWN = {"train.threads", "train.device"}
"""Keys that each process may have for itself; of the device, the kind must be the same."""


def facts(config: Config, device: torch.device, resume: str | os.PathLike[str] | None) -> dict[str, Any]:
    """Return the configuration, versions and plugins of this process, as values for JSON."""
    found = {key: value for key, value in _leaves("", config.to_data()) if key not in OWN}
    found["train.device"] = device.type
    found["--resume"] = None if resume is None else str(resume)
    found |= {"nestopt": VERSION, "python": platform.python_version(), "torch": str(torch.__version__)}
    packages = ["numpy", *(["deepspeed"] if config.train.engine == "deepspeed" else [])]
    found |= {name: _version(name) for name in packages}
    for plugin in registry.plugins():
        state = plugin.error or ("switched off" if plugin.blocked else sorted(map(list, plugin.provides)))
        found[f"plugin {plugin.name}"] = [plugin.source, state]
    return found


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, child in value.items():
            yield from _leaves(join(path, key), child)
    elif isinstance(value, list) and value:
        for i, child in enumerate(value):
            yield from _leaves(join(path, i), child)
    else:
        yield path, value


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
