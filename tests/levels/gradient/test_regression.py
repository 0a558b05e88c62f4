"""Adam and momentum as the closed-form optimum of one regression, solved anew by least squares."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nestopt.core.part import FieldError
from nestopt.levels import adam, matrix_adagrad, momentum, regression_optimum
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


# -- on matrices ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 9])  # fewer rows of gradients than columns: the least of all solutions
def test_a_matrix_answers_whole_gradients_with_the_identity(count: int) -> None:
    """target=0: the m that is nearest to m gᵀ = 1 over all gradients, by least squares of all of them at once."""
    grads, beta, ridge = randoms(2, 5, count=count), 0.8, 0.3
    for side in ("right", "left"):
        level = regression_optimum((beta, beta), target=0.0, ridge=ridge, bias_correction=False, side=side)
        got = run(level, grads)[-1]
        weights = [(1 - beta) * beta ** (count - 1 - i) for i in range(count)]
        shown = grads if side == "right" else [g.mT for g in grads]
        rows, columns = shown[0].shape
        a = torch.cat([math.sqrt(w) * g for w, g in zip(weights, shown, strict=True)])
        b = torch.cat([math.sqrt(w) * torch.eye(rows, dtype=torch.float64) for w in weights])
        a = torch.cat([a, math.sqrt(ridge) * torch.eye(columns, dtype=torch.float64)])
        b = torch.cat([b, torch.zeros(columns, rows, dtype=torch.float64)])
        m = torch.linalg.lstsq(a, b, driver="gelsd").solution.mT
        same(got, m if side == "right" else m.mT, 1e-9)


def test_between_newton_and_momentum_a_matrix_is_matrix_adagrad() -> None:
    grads = randoms(4, 4)
    for side in ("left", "right"):
        got = run(regression_optimum((0.9, 0.99), ridge=0.0, side=side), grads)
        same(got, run(matrix_adagrad(0.9, 0.99, 1e-14, "ema", root_every=1, side=side), grads), 1e-6)
        plain = run(regression_optimum((0.9, 0.99), target="square", ridge=0.0, side=side), grads)
        same(plain, run(regression_optimum((0.9, 0.99), target="square", ridge=0.0), grads), 1e-9)


def test_a_newton_like_step_is_as_long_as_the_inverse_of_a_gradient() -> None:
    grads = [g.float() for g in randoms(3, 6)]  # ridge and rounding: there are more columns than rows
    level = regression_optimum(target=0.0, ridge=0.0, side="right")
    one, small = run(level, grads, 1e-3), run(level, [1e-3 * g for g in grads], 1e-3)
    torch.testing.assert_close(small, 1e3 * one, rtol=1e-2, atol=1e-2 * float(small.abs().max()))
    same(run(level, [torch.zeros(3, 6)] * 2), torch.zeros(2, 3, 6))
