"""What is done to a memory as it is read (NL eq. 52)."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor

from nestopt.core.part import Part


class Output(Part):
    """A function of what is read: of the memory itself where that is linear in its parameters, else of its answer."""

    kind: ClassVar[str] = "output"

    @abstractmethod
    def __call__(self, read: Tensor) -> Tensor: ...


class Plain(Output):
    """The read as it is."""

    def __call__(self, read: Tensor) -> Tensor:
        return read


class Sign(Output):
    """The sign of every entry."""

    def __call__(self, read: Tensor) -> Tensor:
        return read.sign()


class RmsNorm(Output):
    """The read scaled to a root mean square of 1 over the whole tensor.

    Args:
        eps: added under the root (default 1e-12), so that a read of zeros stays zero.
    """

    eps: float = 1e-12

    def __call__(self, read: Tensor) -> Tensor:
        return read * (read.square().mean() + self.eps).rsqrt()
