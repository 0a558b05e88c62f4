"""Following the regularized leader: what it minimises, and what it is at its simplest."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nestopt.core import Signal
from nestopt.levels import ftrl
from nestopt.optim import Nested
from tests.levels.gradient.tools import randoms, same


def descend(make: Any, grads: list[Tensor], start: Tensor) -> list[Tensor]:
    weight, path = nn.Parameter(start.clone()), []
    optimizer = make([weight])
    for grad in grads:
        weight.grad = grad.clone()
        optimizer.step()
        path.append(weight.detach().clone())
    return path


def least(objective: Any) -> float:
    """Where a convex function of one number is least: by thirds, as far as its flatness lets be known."""
    low, high = -50.0, 50.0
    for _ in range(300):
        a, b = low + (high - low) / 3, high - (high - low) / 3
        low, high = (low, b) if objective(a) < objective(b) else (a, high)
    return (low + high) / 2


@pytest.mark.parametrize(("l1", "l2"), [(0.0, 0.0), (0.7, 0.0), (0.0, 0.5), (0.4, 0.3)])
@pytest.mark.parametrize("regularizer", ["start", "proximal"])
def test_it_arrives_at_the_minimum_of_equation_3(regularizer: str, l1: float, l2: float) -> None:
    grads, start, lr, beta = randoms(4, count=6), torch.randn(4, dtype=torch.float64), 0.3, 0.2
    beta = beta if regularizer == "proximal" else 0.0
    path = descend(lambda p: Nested(p, ftrl(regularizer, l1, l2, beta), lr=lr), grads, start)
    for i in range(4):
        before = [float(start[i]), *(float(weight[i]) for weight in path)]
        for t in range(1, 7):
            shown = [float(g[i]) for g in grads[:t]]
            roots = [math.sqrt(sum(g * g for g in shown[:s])) for s in range(t + 1)]

            def objective(w: float, shown: Any = shown, before: Any = before, roots: Any = roots, t: int = t) -> float:
                value = sum(g * w for g in shown) + l1 * abs(w) + l2 / 2 * w * w
                if regularizer == "start":
                    return value + (w - before[0]) ** 2 / (2 * lr)
                near = sum((roots[s + 1] - roots[s]) * (w - before[s]) ** 2 for s in range(t))
                return value + (near + beta * w * w) / (2 * lr)

            assert before[t] == pytest.approx(least(objective), abs=2e-6)


def test_around_the_start_it_is_gradient_descent_and_near_every_weight_adagrad() -> None:
    grads, start = randoms(3, 4), torch.randn(3, 4, dtype=torch.float64)
    for peer, level in (
        (lambda p: torch.optim.SGD(p, lr=0.1), ftrl("start")),
        (lambda p: torch.optim.Adagrad(p, lr=0.1, eps=0.0), ftrl()),
    ):
        ours = descend(lambda p, level=level: Nested(p, level, lr=0.1), grads, start)
        for got, want in zip(ours, descend(peer, grads, start), strict=True):
            same(got, want, 1e-9)


def test_a_rate_of_zero_moves_nothing_and_l1_makes_zeros() -> None:
    start = torch.randn(5)
    assert torch.equal(descend(lambda p: Nested(p, ftrl(), lr=0.0), [torch.ones(5)], start)[-1], start)
    for lr in (0.1, torch.tensor(0.1)):
        grads = [torch.tensor([1.0, 1e-3, 1e-3, 1e-3, -1.0])] * 3
        weight = descend(lambda p, lr=lr: Nested(p, ftrl(l1=0.5), lr=lr), grads, torch.zeros(5))[-1]
        assert torch.equal(weight.abs() > 1e-6, torch.tensor([True, False, False, False, True]))


def test_what_it_needs() -> None:
    grad = torch.ones(2)
    with pytest.raises(ValueError, match="ftrl needs the learning rate"):
        ftrl().step(grad, ftrl().init(grad), Signal(1, grad))
    with pytest.raises(ValueError, match="ftrl: where it goes needs the parameter"):
        ftrl().step(grad, ftrl().init(grad), Signal(1, lr=0.1))
