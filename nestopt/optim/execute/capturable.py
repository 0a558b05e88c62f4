"""A step without a branch on any tensor's value: for compilers, and for accelerators that nobody waits for."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nestopt.core.clock import advance, due
from nestopt.core.device import no_exceptions, where
from nestopt.core.gates import bind
from nestopt.core.level import Level
from nestopt.core.signal import Signal
from nestopt.core.tree import leaves, tree_map
from nestopt.levels.gradient.fused import kernel_of
from nestopt.optim.execute.update import STEP, SUM, UpdateSettings, placed, update, wrong_shape
from nestopt.optim.views import Split, advance_stack, back, begin, layout, matrix_view, work_dtype


def begin_on_device(level: Level, param: Tensor, period: int, view: Split | None) -> dict[str, Any]:
    """Return the state of a parameter before its first step, its step count a tensor on the parameter's device."""
    tree = begin(level, param.detach().to(work_dtype(param)), view)
    state = {STEP: torch.zeros((), dtype=torch.float32, device=param.device)}
    if period > 1:
        state[SUM] = torch.zeros_like(param, dtype=work_dtype(param))
    return state | {path: leaf.clone() for path, leaf in leaves(tree)}


def check_capturable(level: Level, param: Tensor, period: int, view: Split | None, name: str) -> None:
    """Raise ValueError naming the level whose step on `param` can't be captured; found by a step without data."""
    fault = fault_of(level, param, period, view)
    if fault is None:
        return
    inner = [part for _, part in level.parts() if isinstance(part, Level)]
    for part in inner:
        check_capturable(part, param, 1, view, name)
    raise ValueError(
        f"{level.label} is not allowed with capturable=True, for {name} of shape {list(param.shape)}: {fault}; "
        "leave out capturable=True, or give that parameter another stack"
    ) from fault


def fault_of(level: Level, param: Tensor, period: int, view: Split | None) -> Exception | None:
    """Return what a step of `level` on `param` fails by where no value is looked at; None where it does not."""
    if param.is_complex():
        return ValueError("it is complex")
    like = torch.empty(param.shape, dtype=param.dtype, device="meta")
    like.grad = torch.empty_like(like)
    # on a CPU nobody waits, and no graph is captured that could not
    refused = contextlib.nullcontext() if param.device.type == "cpu" else no_exceptions()
    try:
        with refused, torch.no_grad():
            state = begin_on_device(level, like, period, view)
            _step_one(level, like, state, UpdateSettings(0.1, period=period), view)
    except (RuntimeError, ValueError) as fault:  # a number asked for, a wait, a state that grows
        return fault
    return None


def step_capturable(
    level: Level,
    params: Sequence[Tensor],
    states: Sequence[dict[str, Any]],
    settings: UpdateSettings,
    view: Split | None,
) -> None:
    """Step parameters of one device and dtype that have gradients, in place: by torch's kernel, or one by one."""
    torch._foreach_add_([state[STEP] for state in states], 1)
    if not _by_kernel(level, params, states, settings):
        for param, state in zip(params, states, strict=True):
            _step_one(level, param, state, settings, view)


def _by_kernel(
    level: Level, params: Sequence[Tensor], states: Sequence[dict[str, Any]], settings: UpdateSettings
) -> bool:
    """Step all parameters by torch's kernel for the whole update, if it has one that can read them as they lie."""
    kernel = kernel_of(level, params[0])
    # a compiler makes a kernel of its own
    if kernel is None or level.is_scheduled or settings.period > 1 or torch.compiler.is_compiling():
        return False
    grads = [param.grad for param in params if param.grad is not None]
    memories = {key: [state[key] for state in states] for key in states[0] if key != STEP}
    for alike in (params, grads, *memories.values()):
        if any(x.dtype != params[0].dtype or not x.is_contiguous() for x in alike):
            return False
    counts = [state[STEP] for state in states]
    return kernel(level, params, grads, memories, counts, settings.numbers())


def _step_one(level: Level, param: Tensor, state: dict[str, Any], settings: UpdateSettings, view: Split | None) -> None:
    """Step a parameter by `Level.step`, its count already raised; what that decides goes through `where`."""
    wide, step = param.to(work_dtype(param)), state[STEP]
    assert param.grad is not None
    grad = param.grad.to(wide.dtype)
    if settings.period > 1:
        grad = state[SUM].add_(grad)
    level = bind(level, step=step // settings.period)
    shown = matrix_view(settings.gradient(grad, wide), level, view)
    tree = placed(layout(level, param, view), state)
    signal = Signal(step, matrix_view(wide, level, view), settings.lr)
    run = advance_stack if view is not None and view.stacked else advance
    direction, new = run(level, shown, tree, signal.every(settings.period) if settings.period > 1 else signal)
    if direction.shape != shown.shape:
        raise wrong_shape(level, direction, shown)
    stepped = update(wide, back(direction.to(wide.dtype), wide, view), settings.lr, settings.decay)
    if settings.period > 1:
        now = due(step, settings.period)
        new = tree_map(lambda written, old: where(now, written, old), new, tree)
        stepped = where(now, stepped, wide)
        state[SUM].mul_(torch.logical_not(now))  # type: ignore[arg-type]  # a tensor, as the step is
    written, old = dict(leaves(new)), dict(leaves(tree))
    for path, leaf in written.items():
        if leaf.shape != old[path].shape:
            raise ValueError(f"{level.label}: {path} changes its shape, which a capturable step can't follow")
        if any(leaf is other for key, other in old.items() if key != path):
            written[path] = leaf.clone()  # a memory handed on: what it was is written over
    for path, leaf in written.items():
        if leaf is not old[path]:
            old[path].copy_(leaf)
    param.copy_(stepped)
