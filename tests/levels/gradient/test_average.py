"""The corrected average, and what is made of it: Adam and AdEMAMix."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nestopt
from nestopt import Schedule
from nestopt.core import Level, parallel
from nestopt.core.part import FieldError
from nestopt.levels import adam, average, momentum, second_moment
from tests.levels.gradient.tools import randoms, run, same

BETAS, ALPHA, WARMUP = (0.9, 0.999, 0.9999), 5.0, 8


def ademamix() -> Level:
    """Pagliardini et al. 2024, from levels."""
    fast = average(BETAS[0])
    slow = average(Schedule({0: BETAS[0], WARMUP: BETAS[2]}, "half_life"), bias_correction=False)
    return second_moment(BETAS[1], of=parallel(fast=fast, slow=slow, weights=(1.0, Schedule({0: 0.0, WARMUP: ALPHA}))))


def test_it_is_the_loop() -> None:
    grads, want, m = randoms(4, 3), [], torch.zeros(4, 3, dtype=torch.float64)
    for t, grad in enumerate(grads, start=1):
        m = 0.8 * m + 0.2 * grad
        want.append(m / (1 - 0.8**t))
    same(run(average(0.8), grads), torch.stack(want))
    same(run(average(0.8, bias_correction=False), grads), run(momentum(0.8, 0.8), grads))


def test_on_a_clock_it_counts_its_writes() -> None:
    grads = randoms(4, 3, count=9)
    sums = [sum(grads[i : i + 3], torch.zeros(4, 3, dtype=torch.float64)) for i in (0, 3, 6)]
    own = run(average(0.8), sums)
    same(run(average(0.8, period=3), grads)[2::3], own)
    same(own[0], sums[0])


def test_under_a_second_moment_it_is_adam() -> None:
    grads = randoms(4, 3)
    same(run(second_moment(0.99, 1e-3, of=average(0.8)), grads), run(adam((0.8, 0.99), 1e-3), grads))


def loop(w: Tensor, grads: list[Tensor]) -> Tensor:
    """AdEMAMix as its paper has it (algorithm 1 and the schedulers of its section 3), with decoupled weight decay."""
    m1, m2, v = (torch.zeros_like(w) for _ in range(3))
    for t, g in enumerate(grads, start=1):
        a, b, share = math.log(BETAS[0]), math.log(BETAS[2]), t / WARMUP
        beta3 = min(math.exp(a * b / ((1 - share) * b + share * a)), BETAS[2])
        alpha = min(t * ALPHA / WARMUP, ALPHA)
        m1 = BETAS[0] * m1 + (1 - BETAS[0]) * g
        m2 = beta3 * m2 + (1 - beta3) * g
        v = BETAS[1] * v + (1 - BETAS[1]) * g**2
        root = (v / (1 - BETAS[1] ** t)).sqrt() + 1e-8
        w = w - 0.01 * ((m1 / (1 - BETAS[0] ** t) + alpha * m2) / root + 0.1 * w)
    return w


def descended(optimizer: torch.optim.Optimizer, param: nn.Parameter, grads: list[Tensor]) -> Tensor:
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
    return param.detach()


@pytest.mark.parametrize("options", [{}, {"capturable": True}], ids=str)
def test_ademamix_is_the_papers(options: dict[str, Any]) -> None:
    grads, param = randoms(4, 3, count=14), nn.Parameter(torch.ones(4, 3, dtype=torch.float64))
    own = nestopt.optimizer([param], ademamix(), lr=0.01, weight_decay=0.1, **options)
    same(descended(own, param, grads), loop(torch.ones(4, 3, dtype=torch.float64), grads))


def test_ademamix_is_pytorch_optimizers() -> None:
    peer = pytest.importorskip("pytorch_optimizer")
    grads = randoms(4, 3, count=14)
    ours, theirs = (nn.Parameter(torch.ones(4, 3, dtype=torch.float64)) for _ in range(2))
    own = nestopt.optimizer([ours], ademamix(), lr=0.01, weight_decay=0.1)
    other = peer.AdEMAMix(
        [theirs], lr=0.01, betas=BETAS, weight_decay=0.1, weight_decouple=True, alpha=ALPHA, t_alpha_beta3=WARMUP
    )
    same(descended(own, ours, grads), descended(other, theirs, grads))


def test_ademamix_in_yaml() -> None:
    spec = nestopt.to_spec(ademamix())
    assert nestopt.build("level", spec) == ademamix()
    assert "half_life" in str(spec)


@pytest.mark.parametrize("beta", [1.0, -0.1])
def test_refused(beta: float) -> None:
    with pytest.raises(FieldError, match=r"average: beta=.* is not allowed; give a number in \[0, 1\)"):
        average(beta)
