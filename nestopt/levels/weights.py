"""Levels of weights that average them: moving and equal averages, and schedule-free learning."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from nestopt.core.associative import Gd
from nestopt.core.device import number_like
from nestopt.core.level import Level
from nestopt.core.order import Node
from nestopt.core.part import FieldError
from nestopt.core.signal import Signal
from nestopt.core.tree import State
from nestopt.core.weights import OfWeights
from nestopt.levels.gradient.second_moment import SecondMoment
from nestopt.levels.gradient.within import check_whole


class WeightAverage(OfWeights):
    r"""An average of the weights that a stack brings about, to evaluate with (Polyak & Juditsky 1992).

    $$\bar W \leftarrow \mathrm{decay}\,\bar W + (1-\mathrm{decay})\,W \qquad
      (\mathrm{decay}=\mathrm{None}:\ \bar W \leftarrow \bar W + (W - \bar W)/n)$$

    With a decay it is the exponential moving average (EMA) of diffusion models and others, without the equal one of SWA
    (Izmailov et al. 2018). The first weights that count are taken whole. Training goes on as without it;
    `optimizer.eval()` puts the average into the parameters, `optimizer.train()` the trained weights back.

    Args:
        inner: the stack. Default `gd`.
        decay: in [0, 1), or None for an equal average. Default 0.999.
        every: updates from one that counts to the next. Default 1.
        skip: updates before those that may count; until one has counted, the average is the weights. Default 0.

    Raises:
        FieldError: a number out of range.
    """

    inner: Level = dataclasses.field(default_factory=Gd)  # type: ignore[misc]  # a field here
    decay: float | None = 0.999
    every: int = 1
    skip: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decay is not None:
            self.check("decay", 0.0, 1.0, closed="[)")
        check_whole(self, "every")
        if isinstance(self.skip, bool) or not isinstance(self.skip, int) or self.skip < 0:
            raise FieldError(self.label, "skip", self.skip, "is not allowed; give a whole number, 0 or more")

    def init(self, param: Tensor) -> State:
        return {**super().init(param), "average": param.clone()}

    def acts(self, step: int) -> bool:
        since = step - self.skip
        return since <= self.every or since % self.every == 0

    def after_update(self, weights: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        count = (int(signal.step) - self.skip) // self.every
        if count <= 1:
            return weights, {**state, "average": weights.clone()}
        return weights, {**state, "average": torch.lerp(state["average"], weights, self._part(count))}

    def after_update_(self, weights: Tensor, state: State, signal: Signal) -> Tensor:
        count = (int(signal.step) - self.skip) // self.every
        if count <= 1:
            state["average"].copy_(weights)
        else:
            state["average"].lerp_(weights, self._part(count))
        return weights

    def _part(self, count: int) -> float:
        return 1 / count if self.decay is None else 1 - self.decay

    def evaluated(self, weights: Tensor, state: State) -> Tensor:
        average: Tensor = state["average"]
        return average

    def explained(self) -> str:
        kind = "equal" if self.decay is None else f"decay {self.decay:g}"
        counts = f", of every {self.every} updates" * (self.every > 1) + f", after {self.skip}" * bool(self.skip)
        return f"evaluated with an average of the weights ({kind}{counts})"

    def nodes_of_weights(self, name: str, period: int, after: tuple[str, ...]) -> list[Node]:
        own = f"{name}.average", period * self.every, after
        return [Node(*own, memory="average weights", objective="l2 to the weights", rule=self.label)]


class ScheduleFree(OfWeights):
    r"""Schedule-free learning (Defazio et al. 2024): gradients are taken between the iterates and their average.

    $$\begin{aligned} z &\leftarrow z - \mathrm{lr}\,(u(g(y)) + \lambda y), \\
      x &\leftarrow (1-c)\,x + c\,z, \qquad c = \mathrm{lr}_{\max}^p \Big/ \textstyle\sum \mathrm{lr}_{\max}^p, \\
      y &\leftarrow (1-\beta)\,z + \beta\,x \end{aligned}$$

    The parameters hold y; `optimizer.eval()` puts x there, `optimizer.train()` y again. With `inner=second_moment(β2)`
    it is AdamWScheduleFree, with `gd` SGDScheduleFree (weight decay is taken at y, as there); any other stack may be
    within, but no level of weights. After a warmup the learning rate stays as it is; lr_max is the largest so far.

    Args:
        inner: the stack, best without momentum, in whose place the average is. Default `second_moment`.
        beta: β in [0, 1], how near to the average gradients are taken. Default 0.9.
        lr_power: p, 0 or more, by which iterates of a larger learning rate count for more. Default 2.

    Raises:
        FieldError: a number out of range; a level of weights within.
    """

    outermost: ClassVar[bool] = True
    batched: ClassVar[bool] = False  # it keeps two numbers beside tensors
    elementwise: ClassVar[bool] = False

    inner: Level = dataclasses.field(default_factory=SecondMoment)  # type: ignore[misc]  # a field here
    beta: float = 0.9
    lr_power: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("beta", 0.0, 1.0)
        self.check("lr_power", 0.0)
        if self.inner.of_weights:
            problem = "is not allowed: it moves the weights, which schedule_free has in three places; leave it out"
            raise FieldError(self.label, "inner", self.inner, problem)

    def init(self, param: Tensor) -> State:
        numbers = {key: param.new_zeros(()) for key in ("lr_max", "count")}
        return {**super().init(param), "z": param.clone(), "x": param.clone(), **numbers}

    def step(self, grad: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        assert signal.param is not None
        direction, new = super().step(grad, state, signal)
        return direction, {**new, "z": state["z"] - signal.param}  # until the update: what it adds to y, it adds to z

    def step_(self, grad: Tensor, state: State, signal: Signal) -> Tensor:
        assert signal.param is not None
        state["z"].sub_(signal.param)
        return super().step_(grad, state, signal)

    def before_last_(self, grad: Tensor, state: State, signal: Signal) -> tuple[Level, Tensor, State]:
        assert signal.param is not None
        state["z"].sub_(signal.param)
        return super().before_last_(grad, state, signal)

    def after_update(self, weights: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        largest, count, share = self._counted(state, signal)
        z = state["z"] + weights
        x = torch.lerp(state["x"], z, share)
        return torch.lerp(z, x, self.beta), {**state, "z": z, "x": x, "lr_max": largest, "count": count}

    def after_update_(self, weights: Tensor, state: State, signal: Signal) -> Tensor:
        largest, count, share = self._counted(state, signal)
        z = state["z"].add_(weights)
        x = state["x"].lerp_(z, share)
        state["lr_max"].copy_(largest)
        state["count"].copy_(count)
        return torch.lerp(z, x, self.beta)

    def _counted(self, state: State, signal: Signal) -> tuple[Tensor, Tensor, Tensor]:
        """Return lr_max, the sum of weights over the present one, and what of x the present z becomes."""
        before = state["lr_max"]
        largest = torch.maximum(before, number_like(0.0 if signal.lr is None else signal.lr, before))
        # whole, and so exact, while the largest rate stays
        shrunk = (before / largest.clamp_min(torch.finfo(before.dtype).tiny)) ** self.lr_power
        count = state["count"] * shrunk + (largest > 0)
        return largest, count, (largest > 0) / count.clamp_min(1.0)

    def evaluated(self, weights: Tensor, state: State) -> Tensor:
        x: Tensor = state["x"]
        return x

    def explained(self) -> str:
        return f"evaluated with the average of the iterates; gradients are taken {self.beta:g} of the way to it"

    def nodes_of_weights(self, name: str, period: int, after: tuple[str, ...]) -> list[Node]:
        z = Node(f"{name}.z", period, after, "iterates", "the loss", self.label)
        return [z, Node(f"{name}.x", period, (z.name,), "average weights", "l2 to the iterates", self.label)]
