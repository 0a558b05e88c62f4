"""A run of a second, and what is compared of two."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from nestopt.config import Config
from nestopt.train.checkpoints import file as checkpoint
from nestopt.train.report.metrics import read
from nestopt.train.run import Run


def small(text: Path, out: Path, **changes: Any) -> Config:
    """A configuration; `train__steps=3` changes a key."""
    data: dict[str, Any] = {
        "model": {"dim": 16, "blocks": 1, "heads": 2},
        "optimizer": {"stack": {"level": "momentum", "period": 3}, "lr": 0.02},
        "data": {"path": str(text), "window": 16, "batch": 4},
        "train": {
            "steps": 12,
            "eval_every": 4,
            "eval_bytes": 200,
            "final_bytes": 200,
            "log_every": 1,
            "save_every": 4,
            "sample_bytes": 8,
            "out": str(out),
            "device": "cpu",
            "threads": 1,
        },
    }
    for path, value in changes.items():
        section, key = path.split("__")
        data[section][key] = value
    return Config.from_data(data)


def rows(run: Run) -> list[dict[str, Any]]:
    """What is measured, without what depends on the machine's speed."""
    return [
        {k: v for k, v in r.items() if k not in ("seconds", "train/tokens_per_second")} for r in read(run.metrics_file)
    ]


def same_ends(one: Run, other: Run) -> bool:
    """Whether two runs have measured, written and become the same, bit for bit."""
    ours, theirs = checkpoint.load(one.model_file)[0], checkpoint.load(other.model_file)[0]
    return (
        rows(one) == rows(other)
        and one.samples_file.read_text() == other.samples_file.read_text()
        and ours.keys() == theirs.keys()
        and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    )


def content(folder: Path) -> dict[str, bytes]:
    """All files below a folder, and what is in them."""
    return {
        str(path.relative_to(folder)): os.readlink(path).encode() if path.is_symlink() else path.read_bytes()
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }
