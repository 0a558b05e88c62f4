"""Elementwise stacks as one compiled kernel: every number is read once and written once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nestopt.core.clock import advance
from nestopt.core.level import Level
from nestopt.core.signal import Signal
from nestopt.core.tree import State, tree_map
from nestopt.optim.lanes.lane import Member, Rates
from nestopt.optim.lanes.pieces import PiecesLane
from nestopt.optim.views import work_dtype


class CompiledLane(PiecesLane):
    """Members of an elementwise level; whole tensors or packs of small ones go through one kernel.

    It is compiled for tensors of any length, at the first step, and again when a number of the level has changed.
    """

    whole = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._kernels: list[_Kernel] = []

    def move(self, level: Level, grads: Sequence[Tensor], rates: Rates, step: int) -> None:
        kernel = self._kernel_for(level, rates)
        self._now = kernel.run, kernel.numbers(step, rates)
        super().move(level, grads, rates, step)

    def descend(self, level: Level, param: Tensor, grad: Tensor, state: State, rates: Rates, step: int) -> None:
        run, numbers = self._now
        run(param, grad, state, *numbers)

    def _kernel_for(self, level: Level, rates: Rates) -> _Kernel:
        for kernel in self._kernels:
            if kernel.level == level and (kernel.rates.maximize, kernel.rates.coupled) == (
                rates.maximize,
                rates.coupled,
            ):
                return kernel
        self._kernels.append(_Kernel(level, rates, self.members[0]))
        return self._kernels[-1]


class _Kernel:
    """One step of `level` on flat tensors, in place; what changes from step to step comes as tensors."""

    def __init__(self, level: Level, rates: Rates, member: Member) -> None:
        self.level, self.rates, self.dtype = level, rates, work_dtype(member.param)
        self.device = member.param.device
        self.asked = _asked(level, member)
        self.run = torch.compile(self._descend, dynamic=True, fullgraph=True)

    def numbers(self, step: int, rates: Rates) -> tuple[Tensor, ...]:
        """The step, the learning rate, what decay leaves, and 1 / (1 - β^t) of each average."""
        lr = rates.lr
        fade = 1 - lr * rates.decay
        factors = [1 / (1 - beta ** max(1, step // period)) for beta, period in self.asked]
        step_count = torch.tensor(step, device=self.device)
        return step_count, *(
            torch.as_tensor(number, dtype=self.dtype, device=self.device) for number in (lr, fade, *factors)
        )

    def _descend(
        self, param: Tensor, grad: Tensor, state: State, step: Tensor, lr: Tensor, fade: Tensor, *factors: Tensor
    ) -> None:
        wide = param.to(self.dtype)
        shown = self.rates.gradient(grad.to(self.dtype), wide)
        known = dict(zip(self.asked, factors, strict=True))
        signal = Signal(step, wide, lr, debiases=lambda beta, period: known[beta, period])
        direction, new = advance(self.level, shown, state, signal)
        tree_map(lambda old, leaf: old.copy_(leaf), state, new)
        param.copy_(wide * fade - lr * direction)


def _asked(level: Level, member: Member) -> list[tuple[float, int]]:
    """The (β, period) of every average whose start `level` corrects, found by asking it."""
    asked: dict[tuple[float, int], None] = {}

    def note(beta: float, period: int) -> Tensor:
        asked[beta, period] = None
        return torch.ones((), dtype=one.dtype, device=one.device)

    one = torch.ones(1, dtype=work_dtype(member.param), device=member.param.device)
    state = tree_map(lambda leaf: leaf.flatten()[:1].clone(), member.tree)
    step = torch.ones((), dtype=torch.int64, device=one.device)
    advance(level, one, state, Signal(step, one, 0.0, debiases=note))
    return list(asked)
