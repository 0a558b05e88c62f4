"""DeepSpeed in a loop of your own: `initialize`, `save` and `load`, for any module."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nestopt.core.inputs import INPUTS
from nestopt.optim import Nested
from nestopt.optim import optimizer as make_optimizer
from nestopt.optim.sharded.optimizer import Sharded
from nestopt.train.checkpoints.shards import ShardReader
from nestopt.train.engines import deepspeed_settings
from nestopt.train.engines.deepspeed import import_deepspeed, initialized
from nestopt.train.errors import damaged


def initialize(
    model: nn.Module,
    spec: Any = "adamw",
    config: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    **options: Any,
) -> tuple[Any, Sharded, Any, Any]:
    """Call `deepspeed.initialize` with levels for the optimizer: returns engine, optimizer, loader and scheduler.

    Levels do at every stage what they do in one process: those that need whole matrices (muon, shampoo, dgd …) are
    shown them by the process that owns each, elementwise ones (adam, momentum …) step the slices where they lie. The
    engine is used as DeepSpeed says: `loss = engine(batch)`, `engine.backward(loss)`, `engine.step()`.

    Args:
        model: any module, also one made under `deepspeed.zero.Init`.
        spec: as for `nestopt.optimizer`.
        config: DeepSpeed's settings, or the path of its JSON. Clipping is off unless they say `gradient_clipping`.
        options: `lr`, `weight_decay`, `rest`, `groups` and others of `nestopt.optimizer`; `training_data`,
            `lr_scheduler`, `collate_fn` of `deepspeed.initialize`.

    Raises:
        ConfigError: a setting that levels can't be stepped under (an `optimizer` of DeepSpeed's own, NVMe …); a level
            that can't be itself under the others.
    """
    import_deepspeed()
    theirs = {key: options.pop(key) for key in ("training_data", "lr_scheduler", "collate_fn") if key in options}
    given = deepspeed_settings.read(config) if isinstance(config, str | os.PathLike) else dict(config or {})
    with _whole_shapes(model) as real:
        nested = make_optimizer(model, spec, **options)
    _stand_on(nested, real, model)
    return initialized(model, model, nested, deepspeed_settings.checked(given, "config"), **theirs)


def save(engine: Any, folder: str | os.PathLike[str], meta: dict[str, Any] | None = None) -> None:
    """Save what was made by `initialize` so that any stage and any number of processes can load it. All must call it.

    Args:
        engine: DeepSpeed's.
        folder: made if it is not there; it holds one checkpoint, and at any moment a whole one.
        meta: numbers, strings, lists and dicts of your own.
    """
    engine.nestopt.save(Path(folder), {"own": meta or {}})


def load(engine: Any, folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Put back what `save` wrote, at whatever stage and by however many processes. Gives its `meta`.

    Raises:
        CheckpointError: there is none, it can't be read, or it is of another model or optimizer.
    """
    manager = engine.nestopt
    with ShardReader(folder, manager.rank, manager.world) as parts:
        manager.load(parts)
        with damaged(parts.path):
            return dict(parts.meta["own"])


@contextlib.contextmanager
def _whole_shapes(model: nn.Module) -> Iterator[dict[int, nn.Parameter]]:
    """Put tensors without data, of the true shapes, in the place of parameters that `zero.Init` has cut up."""
    real: dict[int, nn.Parameter] = {}
    stand_ins: dict[int, nn.Parameter] = {}
    places = []
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is not None and hasattr(param, "ds_shape"):
                places.append((module, name, param))
                if id(param) not in stand_ins:
                    blank = torch.empty(tuple(param.ds_shape), dtype=param.dtype, device="meta")
                    stand_ins[id(param)] = nn.Parameter(blank, requires_grad=param.requires_grad)
                    real[id(stand_ins[id(param)])] = param
    for module, name, param in places:
        module._parameters[name] = stand_ins[id(param)]
    try:
        yield real
    finally:
        for module, name, param in places:
            module._parameters[name] = param


def _stand_on(nested: Nested, real: Mapping[int, nn.Parameter], model: nn.Module) -> None:
    """Let an optimizer that was made for stand-ins refer to the model's own parameters."""
    if not real:
        return
    for group in nested.param_groups:
        group["params"] = [real.get(id(param), param) for param in group["params"]]
    if any(INPUTS in nested.level(group).needs for group in nested.param_groups):
        nested.watch(model)
