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
from nestopt.optim.lanes.lane import Member, Rates, placed
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
        self._now = kernel, kernel.numbers(step, rates)
        super().move(level, grads, rates, step)

    def descend(self, level: Level, param: Tensor, grad: Tensor, state: State, rates: Rates, step: int) -> None:
        if param.numel() < 2:  # compilers take a length of one for a promise
            super().descend(level, param, grad, state, rates, step)
            return
        kernel, numbers = self._now
        kernel.run([param, grad, *(leaf for _, leaf in leaves(state))], numbers)

    def _kernel_for(self, level: Level, rates: Rates) -> _Kernel:
        for kernel in self._kernels:
            if kernel.serves(level, rates):
                return kernel
        self._kernels.append(_Kernel(level, rates, self.members[0]))
        return self._kernels[-1]


class _Kernel:
    """One step of `level` on flat tensors, in place; what changes from step to step comes as tensors."""

    def __init__(self, level: Level, rates: Rates, member: Member) -> None:
        self.level, self.rates = level, rates
        self.dtype, self.device = work_dtype(member.param), member.param.device
        self.tree, self.asked = member.tree, _asked(level, member)
        self.compiled = torch.compile(_own_copy(_descend), fullgraph=True, options=_OPTIONS)
        self.fresh = True

    def serves(self, level: Level, rates: Rates) -> bool:
        """Whether this is the kernel of `level` for gradients that are treated so."""
        return self.level == level and (self.rates.maximize, self.rates.coupled) == (rates.maximize, rates.coupled)

    def numbers(self, step: int, rates: Rates) -> list[Tensor]:
        """The step, the learning rate, what decay leaves, and 1 / (1 - β^t) of each average."""
        fade = 1 - rates.lr * rates.decay
        factors = [1 / (1 - beta ** max(1, step // period)) for beta, period in self.asked]
        # filled in on the device: a copy from the host would wait for it
        like, count = (torch.empty(0, dtype=dtype, device=self.device) for dtype in (self.dtype, torch.int64))
        return [number_like(step, count), *(number_like(n, like) for n in (rates.lr, fade, *factors))]

    def run(self, tensors: list[Tensor], numbers: list[Tensor]) -> None:
        """Step a flat parameter; `tensors` are it, its gradient, and its state's leaves."""
        if self.fresh:
            self.fresh = False
            for tensor in tensors:
                torch._dynamo.mark_dynamic(tensor, 0)  # compiled once for every length
        self.compiled(self, tensors, numbers)


def _descend(kernel: _Kernel, tensors: list[Tensor], numbers: list[Tensor]) -> None:
    param, grad, *old = tensors
    step, lr, fade, *factors = numbers
    paths = [path for path, _ in leaves(kernel.tree)]
    state = placed(kernel.tree, dict(zip(paths, old, strict=True)))
    wide = param.to(kernel.dtype)
    known = dict(zip(kernel.asked, factors, strict=True))
    signal = Signal(step, wide, lr, debiases=lambda beta, period: known[beta, period])
    direction, new = advance(kernel.level, kernel.rates.gradient(grad.to(kernel.dtype), wide), state, signal)
    tree_map(lambda kept, leaf: kept.copy_(leaf), state, new)
    param.copy_(wide * fade - lr * direction)


_OPTIONS: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
"""A kernel never meets another level, dtype or layout than its lane's, so none of that has to be checked at every call,
which would take longer than the step of a small tensor."""

_copies = itertools.count()


def _own_copy(function: Callable[..., None]) -> Callable[..., None]:
    """`function` with code of its own: the compiler keeps what it has made by the code object."""
    name = f"{function.__name__}_{next(_copies)}"
    return types.FunctionType(function.__code__.replace(co_name=name), function.__globals__, name)


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
