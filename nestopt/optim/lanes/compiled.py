"""Elementwise stacks as one compiled kernel: every number is read once and written once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nestopt.core.clock import advance
from nestopt.core.level import Level
from nestopt.core.signal import Signal
from nestopt.core.tree import State, tree_map
from nestopt.optim.lanes.lane import Rates
from nestopt.optim.lanes.pieces import PiecesLane
from nestopt.optim.views import work_dtype


class CompiledLane(PiecesLane):
    """Members of an elementwise level; whole tensors or packs of small ones go through one kernel.

    It is compiled for tensors of any length, at the first step, and again when a number of the level has changed.
    """

    whole = True
    _kernels: list[tuple[tuple[Level, bool, float], Callable[..., None]]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._kernels = []

    def descend(self, level: Level, param: Tensor, grad: Tensor, state: State, rates: Rates, step: int) -> None:
        numbers = [torch.as_tensor(value, dtype=torch.float64) for value in (step, rates.lr, rates.decay)]
        self._kernel(level, rates)(param, grad, state, *numbers)

    def _kernel(self, level: Level, rates: Rates) -> Callable[..., None]:
        wanted = (level, rates.maximize, rates.coupled)
        for made, kernel in self._kernels:
            if made == wanted:
                return kernel
        kernel = torch.compile(_descent(level, rates), dynamic=True, fullgraph=True)
        self._kernels.append((wanted, kernel))
        return kernel


def _descent(level: Level, rates: Rates) -> Callable[..., None]:
    """One step of `level` on flat tensors, in place; what changes from step to step comes as tensors."""

    def descend(param: Tensor, grad: Tensor, state: State, step: Tensor, lr: Tensor, decay: Tensor) -> None:
        wide = param.to(work_dtype(param))
        shown = rates.gradient(grad.to(wide.dtype), wide)
        rate, fade = lr.to(wide.dtype), (1 - lr * decay).to(wide.dtype)
        direction, new = advance(level, shown, state, Signal(step, wide, rate))
        tree_map(lambda old, leaf: old.copy_(leaf), state, new)
        param.copy_(wide * fade - rate * direction)

    return descend
