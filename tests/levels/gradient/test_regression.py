"""Adam and momentum as the closed-form optimum of one regression, solved anew by least squares."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nestopt.core.part import FieldError
from nestopt.levels import adam, momentum, regression_optimum
from tests.levels.gradient.tools import bytes_per_parameter, randoms, run, same


@given(
    beta=st.floats(0.0, 0.99),
    ridge=st.floats(0.0, 2.0),
    power=st.sampled_from([0.0, 0.5, 0.8, 1.0]),
    corrected=st.booleans(),
)
def test_it_minimises_eq_101(beta: float, ridge: float, power: float, corrected: bool) -> None:
    """min_m Σ w_i (m g_i - P)² + λ m² of every entry, as rows of a least-squares problem."""
    grads = randoms(3, count=5)
    directions = run(regression_optimum((beta, beta), power, ridge, corrected), grads)
    for t in range(1, len(grads) + 1):
        weights = np.array([(1 - beta) * beta ** (t - i) for i in range(1, t + 1)])
        if corrected:
            weights = weights / weights.sum()
        for entry in range(3):
            seen = np.array([float(g[entry]) for g in grads[:t]])
            target = (weights @ seen**2) ** power
            left = np.append(np.sqrt(weights) * seen, np.sqrt(ridge))
            right = np.append(np.sqrt(weights) * target, 0.0)
            (best,), *_ = np.linalg.lstsq(left[:, None], right, rcond=None)
            assert float(directions[t - 1, entry]) == pytest.approx(best, rel=1e-8, abs=1e-10)


@pytest.mark.parametrize("corrected", [False, True])
def test_with_the_root_as_target_it_is_adam(corrected: bool) -> None:
    grads = randoms(3, 4)
    optimum = regression_optimum((0.7, 0.9), "root", 0.0, corrected)
    same(run(optimum, grads), run(adam((0.7, 0.9), 0.0, corrected), grads))


def test_with_the_squares_as_target_it_is_momentum() -> None:
    grads = randoms(3, 4)
    optimum = regression_optimum((0.7, 0.9), "square", 0.0, bias_correction=False)
    same(run(optimum, grads), run(momentum(0.7, dampening=0.7), grads))


def test_names_are_powers_of_the_squares() -> None:
    grads = randoms(3, 4)
    for name, power in (("root", 0.5), ("square", 1.0)):
        assert torch.equal(run(regression_optimum(target=name), grads), run(regression_optimum(target=power), grads))


def test_zeros_give_zeros() -> None:
    for level in (regression_optimum(), regression_optimum(ridge=0.0), regression_optimum(target="square", ridge=0.0)):
        assert torch.equal(run(level, [torch.zeros(3)] * 2), torch.zeros(2, 3))


def test_its_state_is_two_numbers_a_parameter() -> None:
    assert bytes_per_parameter(regression_optimum(), 5, 3) == 8


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: regression_optimum((0.9, 1.0)), ["betas=(0.9, 1.0)", "[0, 1)"]),
        (lambda: regression_optimum((0.9,)), ["two numbers"]),
        (lambda: regression_optimum(target="rood"), ["'rood'", "Did you mean 'root'"]),
        (lambda: regression_optimum(target=-0.5), ["target=-0.5", "[0"]),
        (lambda: regression_optimum(ridge=-1.0), ["ridge=-1.0"]),
    ],
)
def test_wrong_values_say_what_is_allowed(make, words) -> None:
    with pytest.raises(FieldError) as error:
        make()
    for word in words:
        assert word in str(error.value)
