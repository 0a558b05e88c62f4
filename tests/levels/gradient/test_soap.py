"""SOAP against a loop in numpy, and what a basis may not change."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nestopt.core import Signal, advance, start
from nestopt.core.part import FieldError
from nestopt.levels import adam, adamw, gd, momentum, second_moment, soap
from tests.levels.gradient.tools import randoms, run, same


def loop(grads: list[np.ndarray], every: int, beta: float, left: bool = True, right: bool = True) -> list[np.ndarray]:
    """The published algorithm with Adam's average in the original coordinates; a side that is left alone has Q = I."""
    rows, columns = grads[0].shape
    kept = [np.zeros((rows, rows)) if left else None, np.zeros((columns, columns)) if right else None]
    bases = [np.eye(rows), np.eye(columns)]
    m, v, out = np.zeros((rows, columns)), np.zeros((rows, columns)), []
    for t, g in enumerate(grads):
        if t == 0:
            out.append(np.zeros_like(g))
        else:
            seen = bases[0].T @ g @ bases[1]
            m, v = 0.9 * m + 0.1 * g, 0.8 * v + 0.2 * seen**2
            u = (bases[0].T @ m @ bases[1] / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.8**t)) + 1e-8)
            out.append(bases[0] @ u @ bases[1].T)
        for side, product in enumerate((g @ g.T, g.T @ g)):
            if kept[side] is None:
                continue
            kept[side] = beta * kept[side] + (1 - beta) * product
            if t == 0:
                bases[side] = np.linalg.eigh(kept[side])[1][:, ::-1]
            elif t % every == 0:
                moved = kept[side] @ bases[side]
                order = np.argsort(-(bases[side] * moved).sum(0))
                v = np.take(v, order, axis=side)
                bases[side] = np.linalg.qr(moved[:, order])[0]
    return out


@pytest.mark.parametrize(("shape", "largest"), [((4, 4), 9), ((5, 3), 9), ((5, 3), 4), ((3, 5), 4)], ids=str)
@pytest.mark.parametrize("every", [1, 3])
def test_the_published_algorithm(shape: tuple[int, int], largest: int, every: int) -> None:
    grads = randoms(*shape)
    level = soap(adam((0.9, 0.8)), beta=0.7, basis_every=every, max_size=largest)
    wanted = loop([g.numpy() for g in grads], every, 0.7, shape[0] <= largest, shape[1] <= largest)
    # a wide or tall gradient leaves the small eigenvectors of the first basis open
    full = shape[0] == shape[1] or largest == 4
    got = run(level, grads, 1e-7)
    if full:
        same(got, torch.from_numpy(np.stack(wanted)), 1e-7)
    else:
        assert got.shape == (len(grads), *shape)


def test_what_is_turned_with_it_stays_as_it_is() -> None:
    """A basis changes nothing for a level that treats all directions alike: momentum is one."""
    grads = randoms(4, 3)
    for inner in (gd(), momentum(0.9), momentum(0.9, nesterov=True), momentum(0.5, period=2)):
        same(run(soap(inner, basis_every=2), grads, 1e-7)[1:], run(inner, grads[1:]), 1e-7)


def test_adam_sees_the_gradient_turned() -> None:
    """Of gradients that are one matrix in other coordinates, directions are one direction in those."""
    q, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))
    grads = randoms(4, 4)
    same(run(soap(basis_every=3), [q @ g for g in grads], 1e-7), q @ run(soap(basis_every=3), grads, 1e-7), 1e-6)


def test_the_bases_stay_orthogonal_and_a_zero_gradient_moves_nothing() -> None:
    level, state = soap(basis_every=1), start(soap(), torch.zeros(6, 4))
    for t, scale in enumerate([1.0, 1e-25, 1e25, 0.0, 1.0], start=1):
        direction, state = advance(level, torch.randn(6, 4) * scale, state, Signal(t))
        assert direction.isfinite().all()
        for side, size in (("left", 6), ("right", 4)):
            basis = state[side]["basis"]
            torch.testing.assert_close(basis.mT @ basis, torch.eye(size), rtol=0, atol=1e-5)
    _, state = advance(level, torch.zeros(6, 4), start(level, torch.zeros(6, 4)), Signal(1))
    direction, _ = advance(level, torch.zeros(6, 4), state, Signal(2))
    assert not direction.any()


def test_what_it_can_not_be() -> None:
    with pytest.raises(FieldError, match=r"max_size=2 leaves no side of a parameter of shape \(3, 4\)"):
        soap(max_size=2).init(torch.zeros(3, 4))
    with pytest.raises(FieldError, match=r"basis_every=0 is not allowed"):
        soap(basis_every=0)
    level, grad = soap(adamw()), torch.randn(3, 3)
    _, state = level.step(grad, level.init(grad), Signal(1, grad))
    with pytest.raises(ValueError, match="adamw: weight decay needs the parameter"):
        level.step(grad, state, Signal(2, grad))


@pytest.mark.parametrize("over", ["rows", "factored"])
def test_moments_of_rows_are_sorted_with_the_basis(over: str) -> None:
    """Of equal columns, with a basis on the left alone, a row's mean square is that of each of its entries."""
    sizes = torch.eye(3, dtype=torch.float64)[torch.arange(9) % 3] * 9 + 1  # now one row is the largest, now another
    equal = [
        (g * size[:, None]).expand(3, 6).contiguous() for g, size in zip(randoms(3, 1, count=9), sizes, strict=True)
    ]
    found, entries = (
        run(soap(second_moment(0.9, over=kind), basis_every=1, max_size=3), equal, 1e-7) for kind in (over, "entries")
    )
    same(found, entries, 1e-9)
