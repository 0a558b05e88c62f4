"""What an optimizer can't run: refused by name, before anything has changed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nestopt.core.level import Level


def names(group: dict[str, Any], index: int) -> list[str]:
    """What the parameters of group `index` are called: their names where they were given, else their places."""
    return group.get("param_names") or [f"group {index}, parameter {i}" for i in range(len(group["params"]))]


def check_group(group: dict[str, Any]) -> None:
    """Raise ValueError for settings of a group that are out of range."""
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr has {lr.numel()} elements; a tensor learning rate must have 1")
    if not lr >= 0:
        raise ValueError(f"lr={lr!r} is not allowed; give a number, 0 or more")
    if not group["weight_decay"] >= 0:
        raise ValueError(f"weight_decay={group['weight_decay']!r} is not allowed; give a number, 0 or more")
    period = group.get("period", 1)
    if isinstance(period, bool) or not isinstance(period, int) or period < 1:
        raise ValueError(f"period={period!r} is not allowed; give a whole number of steps, 1 or more")


def check_parameters(group: dict[str, Any], index: int, level: Level) -> None:
    """Raise ValueError for a parameter that comes twice, or that the level can't take."""
    needs_matrices, seen = "matrix" in level.needs, set()
    for name, param in zip(names(group, index), group["params"], strict=True):
        if param in seen:
            raise ValueError(f"{name} is in the group twice; a tied weight is one parameter: give it once")
        seen.add(param)
        if not param.is_floating_point():
            raise ValueError(f"{name} is {param.dtype}; levels take real floating-point parameters")
        if needs_matrices and param.ndim < 2:
            raise ValueError(
                f"{level.label} takes matrices, and {name} has shape {tuple(param.shape)}; give such parameters "
                "another stack, or let nestopt.optimizer(model, ...) send them to `rest`"
            )


def check_gradients(groups: list[dict[str, Any]]) -> None:
    """Raise RuntimeError for a gradient that no level takes."""
    for g, group in enumerate(groups):
        for i, param in enumerate(group["params"]):
            if param.grad is not None and param.grad.layout != torch.strided:
                raise RuntimeError(
                    f"{names(group, g)[i]} has a sparse gradient, which levels do not take; "
                    "use sparse=False in its embedding"
                )
