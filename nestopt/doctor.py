"""`nestopt doctor`: what this machine has, what it lacks, and what to do about it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil

import torch

from nestopt._version import VERSION
from nestopt.core.registry import SLOW, registry

NEEDED = ("torch", "numpy", "packaging", "pluggy", "pydantic", "pyyaml")
OPTIONAL = {
    **dict.fromkeys(("matplotlib", "safetensors", "tqdm"), "training and plots: pip install 'nestopt[train]'"),
    **dict.fromkeys(("argcomplete", "rich"), "completion and tables in a terminal: pip install 'nestopt[cli]'"),
    "datasets": "documents, such as FineWeb-Edu: pip install 'nestopt[data]'",
    "deepspeed": "train.engine=deepspeed: pip install 'nestopt[deepspeed]'",
    "tensorboard": "train.loggers=[tensorboard]: pip install 'nestopt[tensorboard]'",
    "wandb": "train.loggers=[wandb]: pip install 'nestopt[wandb]'",
    "transformers": "Hugging Face models: pip install 'nestopt[hf]'",
}


def report() -> tuple[str, bool]:
    """Return the findings as text, and whether nothing that nestopt needs is missing."""
    own = VERSION if _version("nestopt") else f"{VERSION} (a checkout that is not installed)"
    lines, healthy = [f"nestopt {own}, Python {platform.python_version()}, {platform.platform()}"], True
    compiler = shutil.which("g++") or shutil.which("clang++")
    for name in NEEDED:
        version = _version(name)
        healthy &= version is not None
        lines.append(f"  {name} {version or 'MISSING: pip install ' + name}")
    for name, use in OPTIONAL.items():
        lines.append(f"  {name} {_version(name) or f'not installed (for {use})'}")
    lines.append(
        f"devices: cpu ({os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads){_accelerators()}"
    )
    lines.append(f"compiler: {compiler or 'none (torch.compile and some of DeepSpeed need g++)'}")
    for plugin in registry.plugins():
        if plugin.error:
            healthy = False
            lines.append(f"plugin {plugin.name} ({plugin.source}) is SKIPPED: {plugin.error}")
        if plugin.seconds >= SLOW:
            lines.append(f"plugin {plugin.name} ({plugin.source}) is SLOW: its import takes {plugin.seconds:.1f} s")
    lines.append("all well" if healthy else "something needs attention: see the words in capitals")
    return "\n".join(lines), healthy


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _accelerators() -> str:
    found = [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append("mps")
    return "".join(f", {name}" for name in found) or "; no accelerator"
