"""Momentum of preconditioned gradients and of features, and delta momentum with another target."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nestopt import ConfigError
from nestopt.core import AssociativeMemory, Level, Signal, advance, chain, start
from nestopt.core.features import Elu, Identity, Polynomial
from nestopt.core.memories import Vector
from nestopt.core.objectives import Dot
from nestopt.core.part import FieldError
from nestopt.core.retentions import Decay
from nestopt.levels import (
    adam,
    delta_momentum,
    dgd,
    feature_momentum,
    gd,
    momentum,
    newton_schulz,
    preconditioned_momentum,
    second_moment,
    shampoo,
)
from nestopt.levels.gradient.preconditioned import SignedPower
from tests.levels.gradient.tools import bytes_per_parameter, randoms, run, same, states


def test_preconditioned_momentum_entry_by_entry() -> None:
    grads, beta, beta2, eps = randoms(3, 4), 0.8, 0.9, 1e-2
    directions = run(preconditioned_momentum(beta, second_moment(beta2, eps)), grads)
    for i in range(3):
        for j in range(4):
            m = h = 0.0
            for t, g in enumerate(grads, start=1):
                x = float(g[i, j])
                h = beta2 * h + (1 - beta2) * x * x
                m = beta * m + x / (math.sqrt(h / (1 - beta2**t)) + eps)
                assert float(directions[t - 1, i, j]) == pytest.approx(m, rel=1e-12)


PRECONDITIONERS = [gd(), second_moment(), adam(), newton_schulz(), shampoo(beta=0.0), second_moment(period=3)]


@pytest.mark.parametrize("P", PRECONDITIONERS, ids=str)
def test_it_is_a_chain_and_a_choice_of_parts(P: Level) -> None:
    grads = randoms(3, 4)
    got = run(preconditioned_momentum(0.8, P), grads)
    same(got, run(chain(P, momentum(0.8)), grads))
    generic = AssociativeMemory(memory=Vector(), objective=Dot(), retention=Decay(0.8), rule=P)
    same(got, run(generic, grads), 1e-9)


def test_without_a_preconditioner_it_is_momentum() -> None:
    grads = randoms(3, 4)
    want = run(momentum(0.8), grads)
    same(run(preconditioned_momentum(0.8, gd()), grads), want)
    same(run(feature_momentum(0.8, features=Identity()), grads), want)
    same(run(feature_momentum(0.8, features=Polynomial(1)), grads), want)
    same(run(feature_momentum(0.8, features=SignedPower(1.0)), grads), want)


@pytest.mark.parametrize("P", [gd(), second_moment(0.0, 0.0)], ids=["gd", "sign"])
def test_feature_momentum_entry_by_entry(P: Level) -> None:
    grads, beta = randoms(3, 4), 0.8
    directions = run(feature_momentum(beta, P, SignedPower(0.3)), grads)
    for i in range(3):
        for j in range(4):
            m = 0.0
            for t, g in enumerate(grads):
                x = float(g[i, j])
                phi = math.copysign(abs(x) ** 0.3, x)
                m = beta * m + (phi if gd() == P else math.copysign(1.0, phi))
                assert float(directions[t, i, j]) == pytest.approx(m, rel=1e-12)


def test_features_that_are_not_odd_drift() -> None:
    zeros = [torch.zeros(2, dtype=torch.float64)] * 3
    same(run(feature_momentum(0.5, features=Elu()), zeros)[-1], torch.full((2,), 1.75, dtype=torch.float64))


def test_a_scalar_is_one_feature() -> None:
    grads = randoms(count=3)
    same(run(feature_momentum(0.5, features=SignedPower(0.0)), grads)[0], grads[0].sign())


def test_features_of_another_dimension_are_refused() -> None:
    level = feature_momentum(features=Polynomial(2))
    with pytest.raises(FieldError) as error:
        level.init(torch.zeros(3, 4))
    for word in ("feature_momentum: features=", "16 features of 4", "(3, 4)", "signed_power"):
        assert word in str(error.value)
    level.init(torch.zeros(3, 1))  # 1² is 1


@given(exponent=st.floats(0.0, 4.0), k=st.floats(-1e3, 1e3), more=st.floats(0.0, 1e3))
def test_signed_powers_are_odd_and_do_not_fall(exponent: float, k: float, more: float) -> None:
    phi = SignedPower(exponent)
    low, high, negative = (phi(torch.tensor(x, dtype=torch.float64)) for x in (k, k + more, -k))
    assert low <= high
    assert low == -negative


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 3.0])
def test_signed_powers_have_a_finite_derivative_at_zero(exponent: float) -> None:
    k = torch.zeros(3, requires_grad=True)
    (slope,) = torch.autograd.grad(SignedPower(exponent)(k).sum(), k)
    assert slope.isfinite().all()


@pytest.mark.parametrize("normalize", ["clip", "unit", None])
def test_delta_momentum_with_a_target(normalize: str | None) -> None:
    """m ← m (βI - s ĝᵀĝ) + P(g), with P the second moment."""
    grads, beta, zeta, beta2, eps = [0.4 * g for g in randoms(3, 4)], 0.9, 0.5, 0.8, 1e-2
    directions = run(delta_momentum(beta, zeta, normalize, P=second_moment(beta2, eps)), grads)
    m, h = np.zeros((3, 4)), np.zeros((3, 4))
    for t, grad in enumerate(grads, start=1):
        g = grad.numpy()
        square = (g**2).sum()
        s = {"clip": min(1, zeta * square), "unit": min(1, zeta), None: zeta * square}[normalize]
        h = beta2 * h + (1 - beta2) * g**2
        m = m @ (beta * np.eye(4) - s * g.T @ g / square) + g / (np.sqrt(h / (1 - beta2**t)) + eps)
        same(directions[t - 1], torch.from_numpy(m), 1e-10)


def test_delta_momentum_that_forgets_nothing_is_preconditioned_momentum() -> None:
    grads = randoms(3, 4)
    same(run(delta_momentum(0.8, 0.0, P=adam()), grads), run(preconditioned_momentum(0.8, adam()), grads))


def test_delta_momentum_is_never_elementwise() -> None:
    """Its diagonal form, too, divides by the length of the whole gradient."""
    assert not delta_momentum(elementwise=True).is_elementwise
    assert preconditioned_momentum().is_elementwise
    assert not preconditioned_momentum(P=newton_schulz()).is_elementwise


def test_the_preconditioner_keeps_its_own_clock() -> None:
    grads = randoms(2, 2, count=4)
    found = run(preconditioned_momentum(0.5, gd(period=2)), grads)
    total = grads[0] + grads[1]
    same(found[2], 0.5 * total + total)
    assert set(states(preconditioned_momentum(), grads)[-1]) == {"momentum", "P"}


def test_states_are_what_the_equations_need() -> None:
    assert bytes_per_parameter(preconditioned_momentum(), 5, 3) == 8
    assert bytes_per_parameter(feature_momentum(), 5, 3) == 4
    assert bytes_per_parameter(delta_momentum(), 5, 3) == 4
    assert bytes_per_parameter(delta_momentum(P=adam()), 5, 3) == 12


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: preconditioned_momentum(1.5), ["preconditioned_momentum: beta=1.5", "[0, 1]"]),
        (lambda: preconditioned_momentum(P="adm"), ["P: 'adm'", "no level is called", "'adam'"]),
        (lambda: feature_momentum(features="elo"), ["features: 'elo'", "no features is called", "'elu'"]),
        (lambda: SignedPower(5.0), ["exponent=5.0", "[0, 4]"]),
        (lambda: delta_momentum(P=3), ["P: 3", "a level is written as"]),
    ],
)
def test_wrong_values_say_what_is_allowed(make, words) -> None:
    with pytest.raises((FieldError, ConfigError)) as error:
        make()
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("level", [momentum(0.8), momentum(0.8, 0.3), momentum(0.8, 0.8), momentum(0.8, nesterov=True)])
@pytest.mark.parametrize("wrap", [lambda level: level, lambda level: dgd(of=level, delta=0.0)], ids=["", "dgd"])
def test_steady_gain_makes_all_that_comes_of_a_gradient_one_step(level: Level, wrap: Any) -> None:
    stack = wrap(level)
    grad, total = torch.tensor([2.0, -1.0], dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    state = start(stack, grad)
    for t in range(1, 200):
        direction, state = advance(stack, grad if t == 1 else torch.zeros_like(grad), state, Signal(t, grad, 0.1))
        total = total + direction
    torch.testing.assert_close(stack.steady_gain * total, grad, rtol=1e-12, atol=0)
