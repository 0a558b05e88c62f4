"""What is known beside a gradient, with that gradient's life: born, summed and cleared with it."""

from __future__ import annotations

import weakref
from functools import partial

import torch
from torch import Tensor

from nestopt.core.inputs import InputRequest
from nestopt.optim.layer_inputs.sums import Sums
from nestopt.optim.views import work_dtype


class Known:
    """What is known beside the gradient of one parameter: sums over the rows that brought it.

    Attributes:
        sums: over those rows.
        gradient: that one, as it was after the last pass: its place in memory (weakly), its version, and whether it
            had a number that is not 0; None: there is none.
        stepped: whether a step was taken with it.
    """

    gradient: tuple[weakref.ref[Tensor], int, Tensor] | None = None
    stepped: bool = False

    def __init__(self, param: Tensor, wants: InputRequest) -> None:
        self.param, self.sums = param, Sums(wants, work_dtype(param))

    def clear(self) -> None:
        self.gradient, self.stepped = None, False
        self.sums.clear()

    def belongs(self) -> bool:
        """Return whether the parameter's present gradient is the one of the sums, or was made of it in place."""
        if self.gradient is None or (now := self.param.grad) is None or self.gradient[0]() is not now:
            return False
        return (
            not self.stepped or now._version == self.gradient[1]
        )  # what is done to a gradient after its step clears it

    def zeroed(self) -> Tensor | None:
        """Return whether the gradient was set to 0 in place, on its device; None where nothing was done to it."""
        if self.gradient is None or (now := self.param.grad) is None or now._version == self.gradient[1]:
            return None
        return self.gradient[2] & ~_any(now)

    def use(self) -> None:
        """Clear what belongs to another gradient than the present one, with which a step is taken."""
        now = self.param.grad
        if not self.belongs() or self.gradient is None or now is None:
            self.clear()
            return
        if (zeroed := self.zeroed()) is not None:
            self.sums.clear_where(zeroed)
        self.gradient, self.stepped = (self.gradient[0], now._version, self.gradient[2]), True

    def settle(self, arrived: Arrived) -> None:
        """Take in the rows of a pass, if it brought the parameter a gradient; each pass that did not is forgotten."""
        now = self.param.grad
        if now is None or (now is arrived.gradient and now._version == arrived.version):
            return
        if not arrived.continues:
            self.sums.clear()
        self.sums.merge(arrived.sums, keep=False)
        self.gradient = weakref.ref(now, partial(_clear, weakref.ref(self))), now._version, _any(now)
        self.stepped = False


class Arrived:
    """The rows of one backward pass, until it is known whether it brings the parameter a gradient.

    Attributes:
        gradient: of the parameter before that.
        version: of that gradient; -1 where there was none.
        continues: whether this is added to a gradient whose rows are known.
    """

    def __init__(self, known: Known) -> None:
        self.sums = Sums(known.sums.wants, known.sums.dtype)
        self.sums.groups = known.sums.groups
        self.gradient = known.param.grad
        self.version = -1 if self.gradient is None else self.gradient._version
        # waits for the device where a gradient was changed in place and no step was taken with it
        self.continues = known.belongs() and not known.zeroed()


def _clear(known: weakref.ref[Known], gone: object) -> None:
    """Clear the sums of a gradient that is gone."""
    if (found := known()) is not None and found.gradient is not None and found.gradient[0] is gone:
        found.clear()


def _any(grad: Tensor) -> Tensor:
    """Return whether a gradient has a number that is not 0."""
    return torch.linalg.vector_norm(grad, 1) != 0
