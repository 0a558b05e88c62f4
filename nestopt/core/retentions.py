"""What a memory keeps of itself from one step to the next."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor

from nestopt.core.part import Number, Part


class Retention(Part):
    """How a memory's parameters fade before each write."""

    kind: ClassVar[str] = "retention"

    @abstractmethod
    def __call__(self, theta: Tensor) -> Tensor:
        """Return what is kept of one parameter tensor of the memory."""


class Keep(Retention):
    """Everything is kept: nothing is forgotten but by being written over."""

    def __call__(self, theta: Tensor) -> Tensor:
        return theta


class Decay(Retention):
    """A share `keep` in [0, 1] is kept each step: the α of gated memories, the β of momentum.

    Args:
        keep: a constant, or a `Gate` for a share that depends on the token.
    """

    keep: Number = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("keep", 0.0, 1.0)

    def __call__(self, theta: Tensor) -> Tensor:
        return self.keep * theta  # type: ignore[operator]  # a gate is bound to a number before it is used
