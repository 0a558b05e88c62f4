"""What a memory minimises over its associations: how wrong is the read `y` for the value `v`?"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor

from nestopt.core.part import Part


class Objective(Part):
    """A loss of a read and a value, both `[..., D_v]`, summed to a scalar."""

    kind: ClassVar[str] = "objective"

    @abstractmethod
    def __call__(self, y: Tensor, v: Tensor) -> Tensor: ...


class Dot(Objective):
    """Dot-product similarity, -<y, v>: Hebbian writing (NL eq. 14)."""

    def __call__(self, y: Tensor, v: Tensor) -> Tensor:
        return -(y * v).sum()


class L2(Objective):
    """Regression, ½‖y - v‖²: the delta rule (NL eq. 65, with the ½ so that the error is y - v)."""

    def __call__(self, y: Tensor, v: Tensor) -> Tensor:
        return 0.5 * (y - v).square().sum()
