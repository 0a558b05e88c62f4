"""Momentum: what is told of it to memories whose rule it is."""

from __future__ import annotations

import pytest
import torch

from nestopt.core import Gate
from nestopt.levels import momentum
from tests.levels.gradient.tools import run


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("dampening", [0.0, 0.3, 0.9])
def test_damping_makes_all_that_comes_of_a_gradient_one_step(beta: float, dampening: float) -> None:
    level = momentum(beta, dampening=dampening)
    grads = [torch.ones(1, dtype=torch.float64), *[torch.zeros(1, dtype=torch.float64)] * 400]
    total = float(run(level, grads).sum())
    assert level.steady_gain * total == pytest.approx(1.0)


def test_damping_of_gates_is_that_of_their_initial_values() -> None:
    assert momentum(Gate(0.9), dampening=Gate(0.5)).steady_gain == pytest.approx(0.2)
