"""Lion (Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms") as a level for nestopt."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

import nestopt
from nestopt.core import State


class Lion(nestopt.Level):
    r"""Lion: the sign of a short memory's gradient, blended with a long one's.

    $$u = \mathrm{sign}(\beta_1 m + (1-\beta_1)\,g), \qquad m \leftarrow \beta_2 m + (1-\beta_2)\,g$$

    Convention: every entry of the direction is -1, 0 or 1, so learning rates are about a tenth of Adam's.

    Args:
        beta1: share of the memory in the direction. Default 0.9.
        beta2: decay of the memory. Default 0.99.
    """

    # all of it is entry by entry: tensors may be stacked, cut and glued together, which is a great deal faster
    batched: ClassVar[bool] = True
    elementwise: ClassVar[bool] = True

    beta1: float = 0.9
    beta2: float = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("beta1", 0.0, 1.0)
        self.check("beta2", 0.0, 1.0)

    @property
    def forgets_scale(self) -> bool:
        return True

    def init(self, param: Tensor) -> State:
        return {"momentum": torch.zeros_like(param)}

    def step(self, grad: Tensor, state: State, signal: nestopt.Signal) -> tuple[Tensor, State]:
        m = state["momentum"]
        direction = torch.sign(self.beta1 * m + (1 - self.beta1) * grad)
        return direction, {"momentum": self.beta2 * m + (1 - self.beta2) * grad}


@nestopt.hookimpl
def nestopt_register_levels(register: nestopt.core.hookspecs.Register) -> None:
    register("lion", Lion)
