"""A step without a branch on any tensor's value: for compilers, and for accelerators that nobody waits for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nestopt.core.clock import advance, due
from nestopt.core.level import Level
from nestopt.core.signal import Signal
from nestopt.core.tree import State, leaves, tree_map
from nestopt.optim.lanes import STEP, SUM, Rates, check_shape, placed
from nestopt.optim.views import Split, advance_stack, back, begin, layout, matrix_view, work_dtype


def begin_traced(level: Level, param: Tensor, period: int, view: Split | None) -> dict[str, Any]:
    """The state of a parameter before its first step, its step count a tensor on the parameter's device."""
    tree = begin(level, param.detach().to(work_dtype(param)), view)
    state = {STEP: torch.zeros((), device=param.device)}
    if period > 1:
        state[SUM] = torch.zeros_like(param, dtype=work_dtype(param))
    return state | {path: leaf.clone() for path, leaf in leaves(tree)}


def traced_step(
    level: Level, param: Tensor, grad: Tensor, state: dict[str, Any], rates: Rates, view: Split | None
) -> None:
    """One step of one parameter, in place, by `Level.step`; all that depends on the step count goes through `where`."""
    wide = param.to(work_dtype(param))
    step = state[STEP].add_(1)
    grad = grad.to(wide.dtype)
    if rates.period > 1:
        grad = state[SUM].add_(grad)
    shown = matrix_view(rates.gradient(grad, wide), level, view)
    tree = placed(layout(level, param, view), state)
    signal = Signal(step, matrix_view(wide, level, view), rates.lr)
    run = advance if view is None else advance_stack
    direction, new = run(level, shown, tree, signal.every(rates.period) if rates.period > 1 else signal)
    check_shape(level, direction, shown)
    stepped = wide * (1 - rates.lr * rates.decay) if rates.decay else wide
    stepped = stepped - rates.lr * back(direction.to(wide.dtype), wide, view)
    if rates.period > 1:
        now = due(step, rates.period)
        assert isinstance(now, Tensor)
        new = tree_map(lambda written, old: torch.where(now, written, old), new, tree)
        stepped = torch.where(now, stepped, wide)
        state[SUM].mul_(torch.logical_not(now))
    _write(tree, new, level)
    param.copy_(stepped)


def _write(tree: State, new: State, level: Level) -> None:
    before = dict(leaves(tree))
    for path, leaf in leaves(new):
        old = before[path]
        if leaf is old:
            continue
        if leaf.shape != old.shape:
            raise ValueError(f"{level.label}: {path} changes its shape, which a capturable step can't follow")
        old.copy_(leaf)
