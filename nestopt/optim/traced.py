"""A step without a branch on any tensor's value: for compilers, and for accelerators that nobody waits for."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from nestopt.core.clock import advance, due
from nestopt.core.device import no_exceptions
from nestopt.core.level import Level
from nestopt.core.signal import Signal
from nestopt.core.tree import State, leaves, tree_map
from nestopt.levels.gradient.momentum import Momentum
from nestopt.optim.lanes import STEP, SUM, Rates, check_shape, placed
from nestopt.optim.lanes.fused import descend, has_kernel, runs
from nestopt.optim.views import Split, advance_stack, back, begin, layout, matrix_view, work_dtype


def begin_traced(level: Level, param: Tensor, period: int, view: Split | None) -> dict[str, Any]:
    """The state of a parameter before its first step, its step count a tensor on the parameter's device."""
    tree = begin(level, param.detach().to(work_dtype(param)), view)
    state = {STEP: torch.zeros((), dtype=torch.float32, device=param.device)}
    if period > 1:
        state[SUM] = torch.zeros_like(param, dtype=work_dtype(param))
    return state | {path: leaf.clone() for path, leaf in leaves(tree)}


def check_traceable(level: Level, param: Tensor, period: int, view: Split | None, name: str) -> None:
    """Raise ValueError naming the level whose step on `param` can't be captured; found by a step without data."""
    fault = _fault(level, param, period, view)
    if fault is None:
        return
    inner = [part for _, part in level.parts() if isinstance(part, Level)]
    for part in inner:
        check_traceable(part, param, 1, view, name)
    raise ValueError(
        f"{level.label} is not allowed with capturable=True, for {name} of shape {list(param.shape)}: {fault}; "
        "leave out capturable=True, or give that parameter another stack"
    ) from fault


def _fault(level: Level, param: Tensor, period: int, view: Split | None) -> Exception | None:
    like = torch.empty(param.shape, dtype=param.dtype, device="meta")
    like.grad = torch.empty_like(like)
    # on a CPU nobody waits, and no graph is captured that could not
    refused = contextlib.nullcontext() if param.device.type == "cpu" else no_exceptions()
    try:
        with refused, torch.no_grad():
            state = begin_traced(level, like, period, view)
            traced_step(level, like, state, Rates(0.1, period=period), view)
    except (RuntimeError, ValueError) as fault:  # a number asked for, a wait, a state that grows
        return fault
    return None


def fused_step(level: Level, params: list[Tensor], states: list[dict[str, Any]], rates: Rates) -> bool:
    """Step all parameters of one dtype and device by the fused kernel of `level`, counts included, if it has one."""
    if torch.compiler.is_compiling():  # which makes a kernel of its own
        return False
    if rates.period > 1 or not all(has_kernel(level, param) for param in params) or not runs(level, rates):
        return False
    if isinstance(level, Momentum) and level.undamped_start:  # its kernel must be told on the host which step is first
        return False
    grads = [param.grad for param in params if param.grad is not None]
    memories = {key: [state[key] for state in states] for key in states[0] if key != STEP}
    for alike in (grads, *memories.values()):
        if any(x.dtype != param.dtype or not x.is_contiguous() for x, param in zip(alike, params, strict=True)):
            return False
    counts = [state[STEP] for state in states]
    torch._foreach_add_(counts, 1)
    descend(level, params, grads, memories, rates, counts)
    return True


def traced_step(level: Level, param: Tensor, state: dict[str, Any], rates: Rates, view: Split | None) -> None:
    """Step a parameter that has a gradient, in place, by `Level.step`; what the count decides goes through `where`."""
    wide = param.to(work_dtype(param))
    step = state[STEP].add_(1)
    assert param.grad is not None
    grad = param.grad.to(wide.dtype)
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
