"""What a level is told besides the gradient or the token itself."""

from __future__ import annotations

import dataclasses

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Signal:
    """The circumstances of one step.

    Attributes:
        step: which step of the level's own context this is, from 1. A Python int, or an integer tensor under `vmap`.
        param: the tensor that the level's direction will change, if there is one.
    """

    step: int | Tensor
    param: Tensor | None = None

    def every(self, period: int) -> Signal:
        """The signal of a level that acts once in `period` steps: its step counts its own writes."""
        if isinstance(self.step, Tensor):
            # never 0: the branch that is not taken must stay finite for the gradient of `where`
            return dataclasses.replace(self, step=(self.step // period).clamp(min=1))
        return dataclasses.replace(self, step=self.step // period)

    def count(self, like: Tensor) -> int | Tensor:
        """`step` as a number to calculate with: an int, or a tensor in the dtype of `like`."""
        return self.step.to(like.dtype) if isinstance(self.step, Tensor) else self.step

    def on(self, param: Tensor | None) -> Signal:
        return dataclasses.replace(self, param=param)
