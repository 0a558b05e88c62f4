"""Runs as folders of `torch.distributed.checkpoint`, and back: what other frameworks read and write."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from nestopt.config import ConfigError
from nestopt.config.files import making
from nestopt.config.load import load_saved
from nestopt.optim.sharded.saved import WEIGHTS, TensorSlice
from nestopt.train.checkpoints import dcp
from nestopt.train.checkpoints import file as checkpoint
from nestopt.train.checkpoints.shards import ShardReader, ShardWriter
from nestopt.train.errors import CheckpointError, damaged
from nestopt.train.folder import INDEX, check_place, make_place
from nestopt.train.run import Run, locate, weights_from

RUN = "nestopt.run"
"""The tensor that has the configuration and the meta of a run, as bytes of JSON."""


def export(path: str | Path, out: Path) -> str:
    """Write a run as a folder of DCP: its weights as `model.NAME`, and what else its checkpoint has.

    Args:
        path: of the run's folder, whose last checkpoint is taken, or of a `checkpoint*.json` in it; of one that has
            ended and has no checkpoint any more, or of a safetensors file, the weights alone.
        out: a new folder.

    Returns:
        What was written, in words.

    Raises:
        CheckpointError, ConfigError: there is no such run, or something is at `out` already.
    """
    place = locate(path)
    index = place if place.suffix == ".json" else place / INDEX
    if index.is_file():
        with ShardReader(index) as parts:
            tensors = {key: parts.whole(key) for key in parts.keys()}  # noqa: SIM118 (not a dict)
            meta = parts.meta
            run = {"config": Run.open(index.parent).config_file.read_text(encoding="utf-8"), "meta": meta}
        tensors[RUN] = torch.frombuffer(bytearray(json.dumps(run).encode()), dtype=torch.uint8)
        what = f"the checkpoint of step {meta['step']:,}"
    else:
        weights, _ = weights_from(place)
        tensors, what = {WEIGHTS + name: tensor for name, tensor in weights.items()}, "weights alone"
    _check_new("OUT", out)
    with making(out) as made:
        dcp.write(made, tensors)
    return f"{out}: {what}, {len(tensors)} tensors"


def import_(folder: Path, out: Path, prefix: str = WEIGHTS) -> str:
    """Take up a folder of DCP: that of a run as a run, that of any program for its weights.

    Args:
        folder: of DCP.
        out: a new folder, for a run that `export` has written; or a file that ends in `.safetensors`, for weights.
        prefix: what names of weights begin with, which is taken off; where none does, all tensors are weights.

    Returns:
        What was written and left out, in words.

    Raises:
        CheckpointError: the folder can't be read, or lacks what is asked for. ConfigError: `out` can't be.
    """
    tensors, others = dcp.read(folder)
    left = f"; left out, being no tensors: {', '.join(others)}" if others else ""
    if out.suffix == ".safetensors":
        own = {name: tensor for name, tensor in tensors.items() if name != RUN}
        begun = {name.removeprefix(prefix): tensor for name, tensor in own.items() if name.startswith(prefix)}
        weights = begun or own
        if not weights:
            raise CheckpointError(f"{folder}: has no tensors")
        check_place("OUT", out)
        checkpoint.save(out, weights, {})
        return f"{out}: {len(weights)} tensors{left}"
    if RUN not in tensors:
        raise CheckpointError(
            f"{folder}: is not an export of a run of nestopt; give OUT.safetensors, for its weights alone"
        )
    _check_new("OUT", out)
    with damaged(folder):
        run: dict[str, Any] = json.loads(bytes(tensors.pop(RUN).numpy()))
        config, meta = str(run["config"]), dict(run["meta"])
    with making(out) as made:
        (made / "config.yaml").write_text(config, encoding="utf-8")
        load_saved(made / "config.yaml")
        items = ((key, TensorSlice(tensor)) for key, tensor in tensors.items())
        ShardWriter(made, 0, 1, lambda: None).save(items, meta)
    return f"{out}: a run at step {meta['step']:,}; go on with it: nestopt train --resume {out}{left}"


def _check_new(option: str, out: Path) -> None:
    if os.path.lexists(out):
        raise ConfigError(f"{out} is there already; give a new folder", option)
    make_place(option, out.parent)
