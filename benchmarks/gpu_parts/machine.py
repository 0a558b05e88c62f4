"""The card and the software, for the record beside every number."""

from __future__ import annotations

import importlib.metadata

import torch

import nestopt
from benchmarks.gpu_parts.setting import Setting
from benchmarks.machine import describe as describe_host

PEERS = ("triton", "flash-linear-attention", "titans-pytorch", "deepspeed")


def describe(setting: Setting) -> dict[str, object]:
    """By name, all of it plain data."""
    found: dict[str, object] = {"device": setting.device}
    if setting.cuda:
        card = torch.cuda.get_device_properties(setting.device)
        found |= {
            "card": card.name,
            "memory, GB": round(card.total_memory / 1e9, 1),
            "capability": f"{card.major}.{card.minor}",
            "multiprocessors": card.multi_processor_count,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        }
    found |= describe_host()
    found["nestopt"] = nestopt.__version__
    for name in PEERS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found
