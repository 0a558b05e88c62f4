"""Clocks: a level with period C sums what it is shown and writes once every C steps (NL eq. 71), or its mean."""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

from nestopt.core.signal import Signal
from nestopt.core.tree import State, tree_map

SUM, READ = "clock_sum", "clock_read"


class Clocked(Protocol):
    """What a clock knows of a level."""

    period: int
    clock: Literal["sum", "mean"]

    def init(self, param: Tensor) -> State: ...
    def step(self, grad: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]: ...
    def step_(self, grad: Tensor, state: State, signal: Signal) -> Tensor: ...


def start(level: Clocked, param: Tensor) -> State:
    """Return the state that `level` starts with on `param`, with what its clock needs."""
    state = level.init(param)
    if level.period == 1:
        return state
    return {SUM: torch.zeros_like(param), READ: torch.zeros_like(param), **state}


def due(step: int | Tensor, period: int) -> bool | Tensor:
    """Return whether a clock of this period writes at `step` (steps count from 1)."""
    return step % period == 0


def advance(level: Clocked, grad: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
    """Take one step of `level` on its own clock.

    Between writes nothing but the sum changes, and the direction is that of the last write (zero before the first).
    The level itself counts its own writes: it is shown `signal.step // period`. A Python int as `signal.step` skips
    the level's work between writes; a tensor keeps the step free of branches, for `vmap` and compilers.
    """
    if level.period == 1:
        return level.step(grad, state, signal)
    total = state[SUM] + grad
    own = {key: value for key, value in state.items() if key not in (SUM, READ)}
    now = due(signal.step, level.period)
    if isinstance(now, bool):
        if not now:
            return state[READ], {**state, SUM: total}
        direction, own = level.step(_seen(level, total), own, signal.every(level.period))
        return direction, {SUM: torch.zeros_like(total), READ: direction, **own}
    direction, written = level.step(_seen(level, total), own, signal.every(level.period))
    direction = torch.where(now, direction, state[READ])
    own = tree_map(lambda new, old: torch.where(now, new, old), written, own)
    return direction, {SUM: torch.where(now, torch.zeros_like(total), total), READ: direction, **own}


def advance_(level: Clocked, grad: Tensor, state: State, signal: Signal) -> Tensor:
    """Do as `advance` in place, for a step that is a Python int; return the direction (see `Level.step_`)."""
    if level.period == 1:
        return _reported(level.step_(grad, state, signal), signal)
    total, read = state[SUM].add_(grad), state[READ]
    if due(signal.step, level.period):
        own = {key: value for key, value in state.items() if key not in (SUM, READ)}
        direction = level.step_(_seen(level, total), own, signal.every(level.period))
        read.copy_(_reported(direction, signal))
        state.update(own)  # what has grown
        total.zero_()
    return read


def _seen(level: Clocked, total: Tensor) -> Tensor:
    """Return what a level is shown of the sum over its period."""
    return total / level.period if level.clock == "mean" else total


def _reported(direction: Tensor, signal: Signal) -> Tensor:
    if signal.note is not None:
        signal.note("writes", direction.new_ones(()))
        signal.note("update_rms", direction.square().mean().sqrt())
    return direction
