"""The write of one level of a continuum: one step of its learner on the gradient of a period."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.func import vmap

from nestopt.core.associative import Gd
from nestopt.core.clock import advance, start
from nestopt.core.level import Level
from nestopt.core.memories import Theta
from nestopt.core.signal import Signal
from nestopt.core.tree import State, tree_map
from nestopt.levels.deep.step_size import EPS


@dataclasses.dataclass(frozen=True)
class LearnerStep:
    r"""$W \leftarrow W_0 + \mathrm{keep}\,(W - W_0) - \mathrm{rate}\cdot\mathrm{learner}(g)$, for every sequence.

    Attributes:
        learner: any level, without gates; it keeps its state for each weight of each sequence.
        normalized: whether g is the sum of gradients divided by ε and the sum of their energies.
        keep: of the way from the learned start.
    """

    learner: Level
    normalized: bool
    keep: float

    def begin(self, theta: Theta) -> State:
        """Return the learner's state for the weights `[1, ...]`, by name, of one sequence, `[1, ...]` each."""
        own: State = {name: start(self.learner, weight[0]) for name, weight in theta.items()}
        return tree_map(lambda leaf: leaf[None], own)

    def write(
        self,
        theta: Theta,
        total: Theta,
        energy: Tensor,
        own: State,
        *,
        home: Theta,
        rate: Tensor,
        count: Tensor,
        constant: bool,
    ) -> tuple[Theta, State]:
        """Return the weights and the learner's state after one step, `[B, ...]`.

        Args:
            theta: the weights, `[B, ...]` or `[1, ...]`.
            total, energy: the sums of the period, `[B, ...]` and `[B]`.
            own: the learner's state.
            home: W_0, as `theta`.
            rate: a number.
            count: which step of each sequence this is, from 1, `[B]`.
            constant: whether the outer gradient takes the learner's step for a constant.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not constant):
            shown = self._shown(total, energy)
            steps, own = self._steps(theta, shown, own, count)
        if self.keep != 1:
            theta = {name: home[name] + self.keep * (weight - home[name]) for name, weight in theta.items()}
        # in one pass over the weights, which are many
        return {name: torch.addcmul(weight, steps[name], -rate.to(weight)) for name, weight in theta.items()}, own

    def _shown(self, total: Theta, energy: Tensor) -> Theta:
        if not self.normalized:
            return total
        return {name: g / (EPS + energy.reshape(-1, *(1,) * (g.ndim - 1))) for name, g in total.items()}

    def _steps(self, theta: Theta, shown: Theta, own: State, count: Tensor) -> tuple[Theta, State]:
        if type(self.learner) is Gd and self.learner.period == 1:
            return shown, own

        def one(weight: Tensor, g: Tensor, own: State, count: Tensor) -> tuple[Tensor, State]:
            return advance(self.learner, g, own, Signal(step=count, param=weight))

        steps: Theta = {}
        after: State = {}
        for name, g in shown.items():
            weight = theta[name].expand_as(g)
            steps[name], after[name] = vmap(one, randomness="different")(weight, g, own[name], count)
        return steps, after
