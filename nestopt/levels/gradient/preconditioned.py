"""Momentum of what another level, or a feature map, makes of the gradient (NL eq. 46-47, 51)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from nestopt.core.associative import Gd
from nestopt.core.clock import advance, advance_, start
from nestopt.core.features import Features
from nestopt.core.level import Level
from nestopt.core.order import Node
from nestopt.core.part import FieldError, Number
from nestopt.core.signal import Signal
from nestopt.core.tree import State
from nestopt.levels.gradient.second_moment import SecondMoment
from nestopt.levels.gradient.within import nodes_of_momentum


class SignedPower(Features):
    r"""$\varphi(k) = \mathrm{sign}(k)\,\lvert k\rvert^{\mathrm{exponent}}$, entry by entry: for `feature_momentum`.

    1 is the identity; below it large entries count for less (0: only their signs), above for more.

    Args:
        exponent: in [0, 4]. Default ½.
    """

    exponent: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("exponent", 0.0, 4.0)

    def __call__(self, k: Tensor) -> Tensor:
        # a power below 1 has no derivative at 0
        return k.sign() * k.abs().clamp_min(torch.finfo(k.dtype).tiny).pow(self.exponent)


class PreconditionedMomentum(Level):
    r"""A memory of preconditioned gradients (NL eq. 46-47).

    $$m \leftarrow \beta m + P(g), \qquad u = m$$

    P is any level, with a state and a clock of its own: `second_moment` keeps to the diagonal (eq. 105), `shampoo` and
    `newton_schulz` see the matrix. Convention: a sum, as `momentum`, which `P=gd` makes it; with the default P entries
    of u tend to 1/(1-β).

    Args:
        beta: decay β in [0, 1] (a `Gate` on tokens). Default 0.9.
        P: the preconditioner, any level. Default `second_moment`.

    Raises:
        FieldError: β out of range.
    """

    momentum_field: ClassVar[str | None] = "beta"
    reads_param: ClassVar[bool] = False
    batched: ClassVar[bool] = True
    elementwise: ClassVar[bool] = True
    objectives: ClassVar[dict[str, str]] = {"momentum": "dot"}

    beta: Number = 0.9
    P: Level = dataclasses.field(default_factory=SecondMoment)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("beta", 0.0, 1.0)

    @property
    def forgets_scale(self) -> bool:
        return self.P.forgets_scale

    def init(self, param: Tensor) -> State:
        return {"momentum": torch.zeros_like(param), "P": start(self.P, param)}

    def step(self, grad: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        value, inner = advance(self.P, self.key(grad), state["P"], signal.inside("P"))
        m = self.beta * state["momentum"] + value
        return m, {"momentum": m, "P": inner}

    def step_(self, grad: Tensor, state: State, signal: Signal) -> Tensor:
        value = advance_(self.P, self.key(grad), state["P"], signal.inside("P"))
        m: Tensor = state["momentum"]
        if isinstance(self.beta, int | float):
            return torch.add(value, m, alpha=self.beta, out=m)
        return m.mul_(self.beta).add_(value)  # type: ignore[arg-type]  # a tensor: gates are bound by now

    def key(self, grad: Tensor) -> Tensor:
        """Return what P is shown of a gradient: all of it."""
        return grad

    def nodes(self, name: str, period: int = 1, after: tuple[str, ...] = ()) -> list[Node]:
        return nodes_of_momentum(self, self.P, name, period, after)


class FeatureMomentum(PreconditionedMomentum):
    r"""A memory of gradients under a feature map φ (NL eq. 51).

    $$m \leftarrow \beta m + P(\phi(g)), \qquad u = m$$

    The memory is stepped along, so φ must keep the last dimension of the gradient (which it acts on), and should be
    odd: where φ(-g) ≠ -φ(g), as in `elu`, gradients that cancel still move the parameter. `signed_power` with an
    exponent below 1 tames outliers. Convention: a sum, as `momentum`, which `features=identity` makes it.

    Args:
        beta: decay β in [0, 1] (a `Gate` on tokens). Default 0.9.
        P: any level, shown φ(g). Default `gd`.
        features: φ. Default `signed_power`, exponent ½.

    Raises:
        FieldError: β out of range; at `init`, a map that changes the dimension.
    """

    batched: ClassVar[bool] = False  # the last dimension of a stack of scalars is no tensor's
    elementwise: ClassVar[bool] = False

    P: Level = dataclasses.field(default_factory=Gd)
    features: Features = dataclasses.field(default_factory=SignedPower)

    def init(self, param: Tensor) -> State:
        have = param.shape[-1] if param.ndim else 1
        if (made := self.features.dim(have)) != have:
            problem = (
                f"is not allowed: it makes {made} features of {have}, and the memory of them would not fit a "
                f"parameter of shape {tuple(param.shape)}; give a map that keeps the dimension, such as signed_power"
            )
            raise FieldError(self.label, "features", self.features, problem)
        return super().init(param)

    def key(self, grad: Tensor) -> Tensor:
        return self.features(grad) if grad.ndim else self.features(grad.reshape(1)).reshape(())
