"""Elementwise stacks as one compiled kernel: every number is read once and written once."""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nestopt.core.clock import advance
from nestopt.core.device import number_like
from nestopt.core.level import Level
from nestopt.core.signal import Signal
from nestopt.core.tree import State, leaves, tree_map
from nestopt.optim.execute.flat import Flat
from nestopt.optim.execute.update import Slot, UpdateSettings, placed, update
from nestopt.optim.views import work_dtype


class Compiled(Flat):
    """Parameters of an elementwise level; whole tensors or buffers of small ones go through one kernel.

    It is compiled for tensors of any length, at the first step, and again when a number of the level has changed.
    """

    whole = True

    def __init__(self, level: Level, slots: Sequence[Slot], *, packed: bool = True) -> None:
        super().__init__(level, slots, packed=packed)
        self.compiled: list[Compilation] = []

    def move(self, level: Level, grads: Sequence[Tensor], settings: UpdateSettings, step: int) -> None:
        now = next((own for own in self.compiled if own.serves(level, settings)), None)
        if now is None:
            now = Compilation(level, settings, self.slots[0])
            self.compiled.append(now)
        self.now = now, now.numbers(step, settings)
        super().move(level, grads, settings, step)

    def step_piece(
        self, level: Level, param: Tensor, grad: Tensor, state: State, settings: UpdateSettings, step: int
    ) -> None:
        if param.numel() < 2:  # compilers take a length of one for a promise
            super().step_piece(level, param, grad, state, settings, step)
            return
        compiled, numbers = self.now
        compiled.run([param, grad, *(leaf for _, leaf in leaves(state))], numbers)


class Compilation:
    """One step of `level` on flat tensors, in place; what changes from step to step comes as tensors."""

    def __init__(self, level: Level, settings: UpdateSettings, slot: Slot) -> None:
        self.level, self.settings = level, settings
        self.dtype, self.device = work_dtype(slot.param), slot.param.device
        self.tree, self.asked = slot.tree, _asked(level, slot)
        self.compiled = torch.compile(_own_copy(_step), fullgraph=True, options=_OPTIONS)
        self.fresh = True

    def serves(self, level: Level, settings: UpdateSettings) -> bool:
        """Return whether this is the kernel of `level` for gradients that are treated so."""
        return self.level == level and (self.settings.maximize, self.settings.coupled) == (
            settings.maximize,
            settings.coupled,
        )

    def numbers(self, step: int, settings: UpdateSettings) -> list[Tensor]:
        """Return the step, the learning rate, the weight decay, and 1 / (1 - β^t) of each average."""
        factors = [1 / (1 - beta ** max(1, step // period)) for beta, period in self.asked]
        # filled in on the device: a copy from the host would wait for it
        like, count = (torch.empty(0, dtype=dtype, device=self.device) for dtype in (self.dtype, torch.int64))
        return [number_like(step, count), *(number_like(n, like) for n in (settings.lr, settings.decay, *factors))]

    def run(self, tensors: list[Tensor], numbers: list[Tensor]) -> None:
        """Step a flat parameter; `tensors` are it, its gradient, and its state's leaves."""
        if self.fresh:
            self.fresh = False
            for tensor in tensors:
                torch._dynamo.mark_dynamic(tensor, 0)  # compiled once for every length
        self.compiled(self, tensors, numbers)


def _step(kernel: Compilation, tensors: list[Tensor], numbers: list[Tensor]) -> None:
    param, grad, *old = tensors
    step, lr, decay, *factors = numbers
    paths = [path for path, _ in leaves(kernel.tree)]
    state = placed(kernel.tree, dict(zip(paths, old, strict=True)))
    wide = param.to(kernel.dtype)
    known = dict(zip(kernel.asked, factors, strict=True))
    signal = Signal(step, wide, lr, debiases=lambda beta, period: known[beta, period])
    direction, new = advance(kernel.level, kernel.settings.gradient(grad.to(kernel.dtype), wide), state, signal)
    tree_map(lambda kept, leaf: kept.copy_(leaf), state, new)
    param.copy_(update(wide, direction, lr, decay))


_OPTIONS: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
"""A kernel never meets another level, dtype or layout than its executor's, so none of that has to be checked at every
call, which would take longer than the step of a small tensor."""

_copies = itertools.count()


def _own_copy(function: Callable[..., None]) -> Callable[..., None]:
    """Return `function` with code of its own: the compiler keeps what it has made by the code object."""
    name = f"{function.__name__}_{next(_copies)}"
    return types.FunctionType(function.__code__.replace(co_name=name), function.__globals__, name)


def _asked(level: Level, slot: Slot) -> list[tuple[float, int]]:
    """Return the (β, period) of every average whose start `level` corrects, found by asking it."""
    asked: dict[tuple[float, int], None] = {}

    def note(beta: float, period: int) -> Tensor:
        asked[beta, period] = None
        return torch.ones((), dtype=one.dtype, device=one.device)

    one = torch.ones(1, dtype=work_dtype(slot.param), device=slot.param.device)
    state = tree_map(lambda leaf: leaf.flatten()[:1].clone(), slot.tree)
    step = torch.ones((), dtype=torch.int64, device=one.device)
    advance(level, one, state, Signal(step, one, 0.0, debiases=note))
    return list(asked)
