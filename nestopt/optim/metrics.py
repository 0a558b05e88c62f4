"""What the levels of an optimizer have been doing, in numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nestopt.core.device import by_contract
from nestopt.core.signal import Note
from nestopt.optim.execute.update import STEP

SUMMED = frozenset({"writes", "clips"})
"""Reports that are counts: added up over tensors. Of those called `…rms` it is the squares that are averaged."""


class Recorder:
    """Collect what the levels report of one step."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Begin another step."""
        self._sums: dict[str, tuple[Tensor, float]] = {}

    def note(self, group: int, param: Tensor) -> Note:
        """Return where the levels of one parameter report."""

        def take(key: str, value: Tensor) -> None:
            name, weight, value = f"{group}.{key}", 1.0, value.detach().to(_wide(value))
            if key.endswith("rms"):
                value, weight = value.square() * param.numel(), float(param.numel())
            total, weights = self._sums.get(name, (torch.zeros_like(value), 0.0))
            self._sums[name] = total + value, weights + weight

        return take

    def metrics(self) -> dict[str, Tensor]:
        """Return the totals or means over tensors, by `group.level.name`."""
        found = {}
        for name, (total, weights) in self._sums.items():
            last = name.rpartition(".")[2]
            if last in SUMMED:
                found[name] = total
            else:
                found[name] = (total / weights).sqrt() if last.endswith("rms") else total / weights
        return found


def memory_norms(groups: Sequence[Mapping[str, Any]], state: Mapping[Tensor, Mapping[str, Any]]) -> dict[str, Tensor]:
    """Return the Euclidean norm of every kind of state over all tensors of its group, as `group.key.norm`."""
    squares: dict[str, Tensor] = {}
    for index, group in enumerate(groups):
        for param in group["params"]:
            for key, value in state.get(param, {}).items():
                if key == STEP or not value.is_floating_point():
                    continue
                name = f"{index}.{key}.norm"
                square = torch.linalg.vector_norm(value, dtype=_wide(value)).square()
                squares[name] = squares[name] + square if name in squares else square
    return {name: square.sqrt() for name, square in squares.items()}


def _wide(value: Tensor) -> torch.dtype:
    return torch.promote_types(value.dtype, torch.float32)


def finite(grads: Sequence[Sequence[Tensor | None]]) -> bool:
    """Return whether all gradients are finite; waits for the device once."""
    devices: dict[torch.device, list[Tensor]] = {}
    for grad in (grad for own in grads for grad in own if grad is not None):
        devices.setdefault(grad.device, []).append(grad)
    # a sum of absolute values is finite unless one of them is not, or it overflows: then one looks closer
    with by_contract("finite"):
        return all(
            math.isfinite(float(torch.stack([norm.float() for norm in torch._foreach_norm(own, 1)]).sum()))
            or all(bool(grad.isfinite().all()) for grad in own)
            for own in devices.values()
        )
