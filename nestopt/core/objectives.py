"""What a memory minimises over its associations: how wrong is the read `y` for the value `v`?"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import huber_loss

from nestopt.core.memories import Matrix, Memory, Theta
from nestopt.core.part import Part
from nestopt.core.precision import matmul


class Objective(Part):
    """A loss of a read and a value, both `[..., D_v]`, summed to a scalar."""

    kind: ClassVar[str] = "objective"

    @abstractmethod
    def __call__(self, y: Tensor, v: Tensor) -> Tensor: ...

    def error(self, y: Tensor, v: Tensor) -> Tensor | None:
        """Return its gradient with respect to the read, in the shape of y; None where it is not written down.

        An objective that writes it down, and is one of the read alone, is learned by chunks of tokens in a closed form.
        """
        return None

    def loss(self, memory: Memory, theta: Theta, k: Tensor, v: Tensor) -> Tensor:
        """Return the loss of the read at keys `[..., D_k]`; overridden by an objective of the memory itself, too."""
        return self(memory.read(theta, k), v)


class Dot(Objective):
    """Dot-product similarity, -<y, v>: Hebbian writing (NL eq. 14)."""

    def __call__(self, y: Tensor, v: Tensor) -> Tensor:
        return -(y * v).sum()

    def error(self, y: Tensor, v: Tensor) -> Tensor:
        return -v


class L2(Objective):
    """Regression, ½‖y - v‖²: the delta rule (NL eq. 65, with the ½ so that the error is y - v)."""

    def __call__(self, y: Tensor, v: Tensor) -> Tensor:
        return 0.5 * (y - v).square().sum()

    def error(self, y: Tensor, v: Tensor) -> Tensor:
        return y - v


class Lp(Objective):
    """‖y - v‖_p^p / p: p = 2 is `l2`; p = 1 moves by signs, whatever the size of the error.

    Args:
        p: 1 or more. Default 3.
    """

    p: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("p", 1.0)

    def __call__(self, y: Tensor, v: Tensor) -> Tensor:
        return (y - v).abs().pow(self.p).sum() / self.p

    def error(self, y: Tensor, v: Tensor) -> Tensor:
        e = y - v
        return e.sign() * e.abs().pow(self.p - 1)


class Huber(Objective):
    """½e² up to abs(e) = delta, delta · (abs(e) - delta/2) beyond: long errors count less.

    Args:
        delta: above 0. Default 1.
        of: what e is: each of the `"entries"` of y - v, or its `"norm"`; `"switch"`: ½‖y - v‖² while the norm is at
            most delta, and delta · ‖y - v‖₁ beyond, as Yaad has it (Miras, 2504.13173).
    """

    delta: float = 1.0
    of: Literal["entries", "norm", "switch"] = "entries"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("delta", 0.0, closed="()")
        self.check_choice("of", ("entries", "norm", "switch"))

    def __call__(self, y: Tensor, v: Tensor) -> Tensor:
        if self.of == "entries":
            return huber_loss(y, v, reduction="sum", delta=self.delta)
        e = y - v
        length = _length(e)
        if self.of == "norm":
            return huber_loss(length, torch.zeros_like(length), reduction="sum", delta=self.delta)
        near, far = 0.5 * e.square().sum(-1, keepdim=True), self.delta * e.abs().sum(-1, keepdim=True)
        return torch.where(length <= self.delta, near, far).sum()

    def error(self, y: Tensor, v: Tensor) -> Tensor:
        e = y - v
        if self.of == "entries":
            return e.clamp(-self.delta, self.delta)
        length = _length(e)
        far = e / length if self.of == "norm" else e.sign()
        return torch.where(length <= self.delta, e, self.delta * far)


def _length(e: Tensor) -> Tensor:
    """‖e‖ `[.., 1]`, whose derivative is finite at 0."""
    return (e.square().sum(-1, keepdim=True) + 1e-24).sqrt()


class Oja(Objective):
    r"""Oja's rule, $-\langle M k, v\rangle + \tfrac12\lVert M^\top v\rVert^2$ of a matrix memory M (NL eq. 66-67)."""

    def __call__(self, y: Tensor, v: Tensor) -> Tensor:
        raise ValueError("oja is an objective of a matrix memory itself, not of its read alone; give memory=matrix")

    def loss(self, memory: Memory, theta: Theta, k: Tensor, v: Tensor) -> Tensor:
        if not isinstance(memory, Matrix):
            raise ValueError(f"oja: a {memory.label} memory is not allowed; give memory=matrix")
        return -(memory.read(theta, k) * v).sum() + 0.5 * matmul(v, theta["m"]).square().sum()
