"""Which parameters are stepped together, and by which executor."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nestopt.core.level import Level
from nestopt.levels.gradient.fused import kernel_of
from nestopt.optim.execute import flat
from nestopt.optim.execute.capturable import fault_of
from nestopt.optim.execute.compiled import Compiled
from nestopt.optim.execute.flat import Flat
from nestopt.optim.execute.stacked import Stacked
from nestopt.optim.execute.update import STEP, Executor, Slot

log = logging.getLogger("nestopt")

STACK = 1 << 20
"""Elements of a stack at most, on the CPU: what its copies of gradients and parameters take is bounded by it."""

ACCELERATOR, ACCELERATOR_STACK = 1 << 23, 1 << 25
"""On an accelerator, tensors of up to so many elements are stacked (such as 1024 x 4224, of which one alone leaves most
of it idle), and a stack has so many at most: its copies take memory."""


def executors(
    level: Level, slots: Sequence[Slot], *, packed: bool = True, compiled: bool = False, alone: bool = False
) -> list[Executor]:
    """Give every slot an executor.

    Args:
        level: what they run.
        slots: any.
        packed: whether states may be moved into common buffers; not worth it where parameters come and go.
        compiled: whether to compile a kernel for what is elementwise and has none.
        alone: whether each is stepped by itself, as one whose level is told more than its gradient.
    """
    together: dict[Any, list[Slot]] = {}
    for slot in slots:
        way = None if alone else _way(level, slot, packed)
        together.setdefault((int(slot.state[STEP]), slot.param.device, slot.param.dtype, way), []).append(slot)
    made: list[Executor] = []
    for (_, device, _, way), own in together.items():
        if way is None:
            made.append(Executor(level, own))
        elif way in ("kernel", "pieces"):
            kind = Compiled if compiled and way == "pieces" and _compiles(level, own[0]) else Flat
            made.append(kind(level, own, packed=packed))
        else:
            most = STACK if device.type == "cpu" else ACCELERATOR_STACK
            stacks = -(-len(own) // max(1, most // way.numel()))
            for i in range(stacks):  # as even as can be
                part = own[len(own) * i // stacks : len(own) * (i + 1) // stacks]
                made.append(Stacked(level, part) if len(part) > 1 else Executor(level, part))
    return made


def _compiles(level: Level, slot: Slot) -> bool:
    """Return whether a kernel of `level` can be told what its schedules give; that it can't is said."""
    fault = fault_of(level, slot.param, 1, slot.view) if level.is_scheduled else None
    if fault is not None:
        log.warning("%s runs without compile=True: its schedules give numbers that it looks at: %s", level.label, fault)
    return fault is None


def _way(level: Level, slot: Slot, packed: bool) -> str | torch.Size | None:
    """Return how a slot is stepped: flat, by torch's kernel or in pieces; in a stack of its shape; None: by itself."""
    param, device = slot.param, slot.param.device.type
    if type(param) not in (Tensor, nn.Parameter) or param.is_complex():
        return None
    if level.is_elementwise:
        if param.is_contiguous() and kernel_of(level, param):
            return "kernel"
        return "pieces" if (packed and param.numel() <= flat.SMALL) or flat.is_dense(param) else None
    limit = flat.SMALL if device == "cpu" else ACCELERATOR
    return param.shape if packed and (slot.view is None or not slot.view.stacked) and param.numel() <= limit else None
