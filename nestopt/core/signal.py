"""What a level is told besides the gradient or the token itself."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from nestopt.core.inputs import LayerInputs

Debiases = Callable[[float | Tensor, int], Tensor]
"""What gives 1 / (1 - β^(step // period)) ready made."""

Note = Callable[[str, Tensor], None]
"""Takes what a level reports of its work, by name."""


@dataclasses.dataclass(frozen=True)
class Signal:
    """The circumstances of one step.

    Attributes:
        step: which step of the level's own context this is, from 1. A Python int, or an integer tensor under `vmap`.
        param: the tensor that the level's direction will change, if there is one.
        lr: the learning rate by which the direction will be multiplied, where that is known: the optimizer's.
        inputs: what the layer that `param` belongs to was shown, for levels that require `"inputs"`; None where it
            was never seen.
        note: where a level reports numbers about its work (`signal.report`); None while nobody listens.
        divided: how many steps of the outermost context one step of this one is.
        debiases: where `debias` gets its factors from, if not from `step`: inside a compiled kernel a power would be
            calculated anew for every entry of a tensor.
    """

    step: int | Tensor
    param: Tensor | None = None
    lr: float | Tensor | None = None
    inputs: LayerInputs | None = None
    note: Note | None = None
    divided: int = 1
    debiases: Debiases | None = None

    def every(self, period: int) -> Signal:
        """Return the signal of a level that acts once in `period` steps: its step counts its own writes."""
        if isinstance(self.step, Tensor):
            # never 0: the branch that is not taken must stay finite for the gradient of `where`
            step: int | Tensor = (self.step // period).clamp(min=1)
        else:
            step = self.step // period
        return dataclasses.replace(self, step=step, divided=self.divided * period)

    def debias(self, average: Tensor, beta: float | Tensor) -> Tensor:
        """average / (1 - β^step): what an average with decay β would be, had it not started at 0 (Kingma & Ba 2015)."""
        if self.debiases is not None:
            return average * self.debiases(beta, self.divided)
        if isinstance(beta, Tensor):
            return average / -torch.expm1(self.step * beta.log())
        if not isinstance(self.step, Tensor):
            return average / (1.0 - beta**self.step)
        # 1 - β^t would lose its digits where β^t is close to 1
        return average / -torch.expm1(self.step.to(average.dtype) * math.log(beta)) if beta else average

    def on(self, param: Tensor | None) -> Signal:
        """Return the signal of a level that learns `param`, which is a memory's, or another level's state."""
        return dataclasses.replace(self, param=param, lr=None, inputs=None)

    def inside(self, name: str) -> Signal:
        """Return the signal of the part `name` of a level: what it reports is filed under that name."""
        note = self.note
        if note is None:
            return self
        return dataclasses.replace(self, note=lambda key, value: note(f"{name}.{key}", value))

    def report(self, key: str, value: Callable[[], Tensor]) -> None:
        """Report a number (a tensor of one element) to whoever listens; `value` is only called if someone does."""
        if self.note is not None:
            self.note(key, value())
