"""Model and optimizer as tensors by name and plain values, for a checkpoint; and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nestopt.optim import Nested
from nestopt.train.checkpoint import CheckpointError

MODEL, OPTIMIZER = "model.", "optimizer."


def pack(model: nn.Module, optimizer: Nested) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors: `model.NAME` and `optimizer.NAME|KEY`, by parameter name. Values: the optimizer's groups."""
    state = optimizer.state_dict()
    names = [name for group in state["param_groups"] for name in group["param_names"]]
    tensors = {MODEL + name: value for name, value in model.state_dict().items()}
    tensors |= {
        f"{OPTIMIZER}{names[index]}|{key}": value
        for index, entry in state["state"].items()
        for key, value in entry.items()
    }
    return tensors, {"groups": state["param_groups"]}


def unpack(model: nn.Module, optimizer: Nested, packed: tuple[dict[str, Tensor], dict[str, Any]]) -> None:
    """Put both back, in place.

    Raises:
        CheckpointError: the checkpoint is of another model or optimizer. Nothing has been changed then.
    """
    tensors, values = packed
    weights = {name.removeprefix(MODEL): value for name, value in tensors.items() if name.startswith(MODEL)}
    wanted = model.state_dict()
    wrong = sorted(
        {*(wanted.keys() ^ weights.keys())}
        | {name for name in wanted.keys() & weights if wanted[name].shape != weights[name].shape}
    )
    if wrong:
        raise CheckpointError(
            f"the checkpoint is of another model: {', '.join(wrong[:5])} differ ({len(wrong)} in all)"
        )
    names = [name for group in values["groups"] for name in group["param_names"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if name.startswith(OPTIMIZER):
            param, _, key = name.removeprefix(OPTIMIZER).rpartition("|")
            state.setdefault(names.index(param), {})[key] = value
    if names != [name for group in optimizer.param_groups for name in group["param_names"]]:
        raise CheckpointError("the checkpoint's optimizer has its parameters in other groups")
    try:
        optimizer.load_state_dict({"state": state, "param_groups": values["groups"]})
    except ValueError as error:
        raise CheckpointError(f"the checkpoint is of another optimizer: {error}") from error
    model.load_state_dict(weights)


def random_state() -> dict[str, Tensor]:
    """torch's generators, as tensors."""
    found = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        found |= {f"cuda{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return found


def restore_random_state(state: dict[str, Tensor]) -> None:
    """Put back what `random_state` gave."""
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            if f"cuda{i}" in state:
                torch.cuda.set_rng_state(state[f"cuda{i}"], i)
