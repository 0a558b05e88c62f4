"""Matrix AdaGrad and Shampoo against loops that take their roots from a singular value decomposition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nestopt.core.part import FieldError
from nestopt.levels import matrix_adagrad, muon, second_moment, shampoo
from nestopt.levels.gradient.matrix_root import inverse_root
from tests.levels.gradient.tools import bytes_per_parameter, randoms, run, same, states

OUT, IN, EPS = 3, 4, 1e-3


def root(gram: np.ndarray, order: int, eps: float = EPS) -> np.ndarray:
    """(A + ε λ_max I)^(-1/order), by singular values."""
    u, s, vt = np.linalg.svd(gram + eps * np.linalg.norm(gram, 2) * np.eye(len(gram)))
    return (u * s ** (-1 / order)) @ vt


def loop(grads, sides, order, beta=0.0, beta2=None, every=1, corrected=True):
    """eq. 106-111 to the letter, or with averages."""
    left, right, m, found = np.zeros((OUT, OUT)), np.zeros((IN, IN)), np.zeros((OUT, IN)), []
    keep, take = (1, 1) if beta2 is None else (beta2, 1 - beta2)
    roots = {}
    for t, grad in enumerate(grads, start=1):
        g = grad.numpy()
        m = beta * m + (1 - beta) * g
        left, right = keep * left + take * g @ g.T, keep * right + take * g.T @ g
        if t <= every or t % every == 1 % every:
            scale = 1 - beta2**t if beta2 is not None and corrected else 1
            roots = {"left": root(left / scale, order), "right": root(right / scale, order)}
        u = m / (1 - beta**t) if corrected else m
        u = roots["left"] @ u if "left" in sides else u
        found.append(torch.from_numpy(u @ roots["right"] if "right" in sides else u))
    return torch.stack(found)


@pytest.mark.parametrize("beta", [0.0, 0.7])
@pytest.mark.parametrize("beta2", [None, 0.8])
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("corrected", [False, True])
def test_against_the_equations(beta: float, beta2: float | None, every: int, corrected: bool) -> None:
    grads = randoms(OUT, IN, count=9)
    mode = {} if beta2 is None else {"mode": "ema", "beta2": beta2}
    fields = {"beta": beta, "eps": EPS, "root_every": every, "bias_correction": corrected, **mode}
    for side in ("left", "right"):
        want = loop(grads, [side], 2, beta, beta2, every, corrected)
        same(run(matrix_adagrad(side=side, **fields), grads), want, 1e-8)
    want = loop(grads, ["left", "right"], 4, beta, beta2, every, corrected)
    same(run(shampoo(**fields), grads), want, 1e-8)


def test_on_diagonal_gradients_matrix_adagrad_is_adagrad() -> None:
    grads = [torch.diag(g) for g in randoms(4)]
    want = run(second_moment(eps=0.0, mode="sum"), grads)
    same(run(matrix_adagrad(0.0, eps=1e-14), grads), want, 1e-10)


def test_a_first_gradient_of_rank_one_is_scaled_to_norm_one() -> None:
    u, v = torch.randn(OUT, dtype=torch.float64), torch.randn(IN, dtype=torch.float64)
    (direction,) = run(shampoo(0.0, eps=1e-12), [torch.outer(u, v)])
    same(direction, torch.outer(u / u.norm(), v / v.norm()), 1e-8)


def test_the_first_direction_is_that_of_muon_run_to_its_end() -> None:
    grads = randoms(OUT, IN, count=1)
    polar = run(muon(0.0, nesterov=False, steps=60, coefficients=(1.5, -0.5, 0.0), scale=None), grads)
    same(run(shampoo(0.0, eps=1e-13), grads), polar, 1e-8)
    same(run(matrix_adagrad(0.0, eps=1e-13), grads), polar, 1e-8)


@settings(max_examples=20)
@given(seed=st.integers(0, 99), mode=st.sampled_from(["sum", "ema"]))
def test_rotated_gradients_give_rotated_directions(seed: int, mode: str) -> None:
    torch.manual_seed(seed)
    left, _ = torch.linalg.qr(torch.randn(OUT, OUT, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(IN, IN, dtype=torch.float64))
    grads, level = randoms(OUT, IN, count=4), shampoo(mode=mode, root_every=2)
    same(run(level, [left @ g @ right for g in grads], 1e-6), left @ run(level, grads, 1e-6) @ right, 1e-6)


def test_roots_are_kept_between_their_steps() -> None:
    found = [state["left"]["root"] for state in states(shampoo(root_every=3), randoms(OUT, IN, count=8))]
    changed = [t for t in range(2, 9) if not torch.equal(found[t - 2], found[t - 1])]
    assert changed == [2, 3, 4, 7]


def test_a_long_side_is_left_alone_and_the_other_takes_its_share() -> None:
    grads = randoms(OUT, IN)
    level = shampoo(max_size=OUT)
    assert level.init(grads[0])["right"]["gram"].numel() == 0
    same(run(level, grads), run(matrix_adagrad(side="left"), grads))


@pytest.mark.parametrize("level", [shampoo(max_size=2), matrix_adagrad(side="right", max_size=OUT)], ids=str)
def test_a_matrix_without_any_side_left_is_refused(level) -> None:
    with pytest.raises(FieldError, match=r"max_size=\d leaves nothing .* shape \(3, 4\); raise it"):
        level.init(torch.zeros(OUT, IN))


def test_zeros_give_zeros() -> None:
    zeros = [torch.zeros(OUT, IN)] * 2
    for level in (shampoo(), matrix_adagrad(), shampoo(mode="ema")):
        assert torch.equal(run(level, zeros), torch.zeros(2, OUT, IN))


def test_states_are_what_the_equations_need() -> None:
    out, into = 6, 4
    full = bytes_per_parameter(shampoo(), out, into) * out * into
    assert full == 4 * (out * into + 2 * out**2 + 2 * into**2)
    assert bytes_per_parameter(shampoo(beta=0.0), out, into) * out * into == full - 4 * out * into
    assert bytes_per_parameter(matrix_adagrad(0.0), out, into) * out * into == 4 * 2 * out**2


# -- the root --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [1, 2, 4, 8])
def test_a_root_of_each_matrix_alone(order: int) -> None:
    x = torch.randn(2, 5, 4, 7, dtype=torch.float64)
    gram = x @ x.mT
    got = inverse_root(gram, order, 1e-4)
    for i in range(2):
        for j in range(5):
            same(got[i, j], torch.from_numpy(root(gram[i, j].numpy(), order, 1e-4)), 1e-9)


def test_a_root_of_zeros_is_the_identity_and_float32_is_enough_for_bfloat16() -> None:
    assert torch.equal(inverse_root(torch.zeros(3, 3), 4), torch.eye(3))
    half = inverse_root(2 * torch.eye(3, dtype=torch.bfloat16), 2)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), torch.eye(3) * 2**-0.5, rtol=0.01, atol=0)


@pytest.mark.parametrize("order", [2, 4])
@pytest.mark.parametrize("values", [(1.0, 2.0, 3.0), (1.0, 1.0, 2.0), (0.0, 0.0, 1.0)], ids=str)
def test_a_root_has_its_derivative_also_where_eigenvalues_coincide(order: int, values: tuple[float, ...]) -> None:
    rotation, _ = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))
    factor = (rotation * torch.tensor(values, dtype=torch.float64).sqrt()).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: inverse_root(x @ x.mT, order, 0.1), factor)


def test_a_root_of_another_order_is_refused() -> None:
    with pytest.raises(ValueError, match=r"order=3 .* a power of 2"):
        inverse_root(torch.eye(2), 3)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: shampoo(1.0), ["shampoo: beta=1.0", "[0, 1)"]),
        (lambda: shampoo(eps=0.0), ["eps=0.0", "(0"]),
        (lambda: shampoo(beta2=0.9), ["beta2=0.9", "no effect", "mode='sum'"]),
        (lambda: shampoo(mode="mean"), ["mode='mean'", "'sum', 'ema'"]),
        (lambda: shampoo(root_every=0), ["root_every=0", "1 or more"]),
        (lambda: shampoo(root_every=2.5), ["root_every=2.5", "whole"]),
        (lambda: matrix_adagrad(side="lefd"), ["side='lefd'", "Did you mean 'left'"]),
    ],
)
def test_wrong_values_say_what_is_allowed(make, words) -> None:
    with pytest.raises(FieldError) as error:
        make()
    for word in words:
        assert word in str(error.value)
