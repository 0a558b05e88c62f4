"""Gradients of any size, and those that are no numbers: what is left of them a step later."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nestopt import levels
from nestopt.core import Level, Signal, chain
from nestopt.core.clock import start
from nestopt.core.memories import Window
from nestopt.core.scale import largest, root_mean_square
from nestopt.core.tree import leaves
from nestopt.optim import Nested

few = settings(max_examples=20)

ANY_SIZE: dict[str, Callable[[], Level]] = {
    "attention": lambda: levels.attention(memory=Window(3)),
    "deep_momentum": levels.deep_momentum,
    "delta_momentum": levels.delta_momentum,
    "delta_momentum unit": lambda: levels.delta_momentum(normalize="unit", elementwise=True),
    "feature_momentum": levels.feature_momentum,
    "m3": lambda: levels.m3(slow_period=2),
    "matrix_adagrad": lambda: levels.matrix_adagrad(mode="ema"),
    "momentum, muon": lambda: chain(levels.momentum(), levels.muon()),
    "muon": levels.muon,
    "newton_schulz": levels.newton_schulz,
    "preconditioned_momentum": levels.preconditioned_momentum,
    "regression_optimum": levels.regression_optimum,
    "second_moment": levels.second_moment,
    "adagrad": lambda: levels.second_moment(mode="sum"),
    "second_moment of muon": lambda: levels.second_moment(of=levels.muon()),
    "shampoo": levels.shampoo,
    "ttt": levels.ttt,
}

SCALE_FREE: dict[str, Callable[[], Level]] = {
    "muon": lambda: levels.muon(dtype="float32"),
    "newton_schulz": lambda: levels.newton_schulz(dtype="float32", form="gram"),
    "m3": lambda: levels.m3(slow_period=2, dtype="float32"),
}


def gradient(t: int, i: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(10 * t + i)).to(dtype)


def step(optimizer: Nested, t: int, scale: float = 1.0) -> None:
    for i, param in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        param.grad = gradient(t, i, param.dtype) * scale
    optimizer.step()


def made(level: Level, dtype: torch.dtype = torch.float32, count: int = 2) -> Nested:
    random = torch.Generator().manual_seed(0)
    return Nested(
        [(f"w{i}", torch.randn(5, 4, generator=random).to(dtype).requires_grad_()) for i in range(count)], level
    )


def numbers(optimizer: Nested) -> list[Tensor]:
    return [
        x.detach().clone()
        for group in optimizer.param_groups
        for param in group["params"]
        for x in (param, *optimizer.state.get(param, {}).values())
    ]


@pytest.mark.parametrize("name", ANY_SIZE)
@few
@given(st.floats(-37, 30), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 3))
def test_a_gradient_of_any_size_leaves_numbers_and_a_level_that_goes_on(
    name: str, exponent: float, dtype: torch.dtype, at: int
) -> None:
    optimizer = made(ANY_SIZE[name](), dtype)
    for t in range(6):
        step(optimizer, t, 10**exponent if t == at else 1.0)
        assert all(x.isfinite().all() for x in numbers(optimizer))
    for param in optimizer.param_groups[0]["params"]:
        param.data.zero_()  # where no step is lost in rounding
    step(optimizer, 6)
    assert all(param.count_nonzero() for param in optimizer.param_groups[0]["params"])


@pytest.mark.parametrize("name", SCALE_FREE)
@few
@given(st.floats(-30, 30))
def test_the_scale_of_all_gradients_changes_nothing(name: str, exponent: float) -> None:
    one, other = made(SCALE_FREE[name]()), made(SCALE_FREE[name]())
    for optimizer in (one, other):
        optimizer.param_groups[0]["lr"] = 1.0
    for t in range(5):
        step(one, t)
        step(other, t, 10**exponent)
        for a, b in zip(one.param_groups[0]["params"], other.param_groups[0]["params"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=8))
def test_sizes_are_those_in_double_precision(values: list[float]) -> None:
    x, wide = torch.tensor(values), torch.tensor(values, dtype=torch.float64)
    tiny = torch.finfo(torch.float32).tiny
    assert largest(x).item() == max(wide.abs().max().item(), tiny)
    want = max(math.sqrt(wide.square().mean().item()), tiny)
    assert math.isclose(root_mean_square(x).item(), want, rel_tol=1e-5)


def test_zeros_have_a_gradient_that_is_finite() -> None:
    for level in (levels.m3(), levels.deep_momentum(), levels.delta_momentum(), levels.shampoo()):
        grad = torch.zeros(5, 4, dtype=torch.float64, requires_grad=True)
        direction, _ = level.step(
            grad, start(level, torch.zeros(5, 4, dtype=torch.float64)), Signal(1, torch.ones(5, 4))
        )
        assert torch.equal(direction, torch.zeros_like(direction))
        assert torch.autograd.grad(direction.sum(), grad)[0].isfinite().all()


# -- an infinity, a NaN ----------------------------------------------------------------------------------------------

ROOTS: dict[str, Callable[[], Level]] = {
    "shampoo": levels.shampoo,
    "shampoo ema": lambda: levels.shampoo(mode="ema", beta=0.0),
    "matrix_adagrad": levels.matrix_adagrad,
    "within": lambda: chain(levels.momentum(), levels.shampoo()),
}

bad = st.sampled_from([math.inf, -math.inf, math.nan])


@pytest.mark.parametrize("name", ROOTS)
@few
@given(bad, st.integers(0, 13), st.integers(0, 1))
def test_levels_of_roots_name_what_is_no_number_before_anything_has_changed(
    name: str, value: float, at: int, which: int
) -> None:
    one, other = made(ROOTS[name]()), made(ROOTS[name]())
    for t in range(14):
        if t == at:
            for i, param in enumerate(one.param_groups[0]["params"]):
                param.grad = gradient(99, i)
            one.param_groups[0]["params"][which].grad[1, 2] = value
            with pytest.raises(RuntimeError, match=f"infinity or a NaN: w{which}; nothing has been changed"):
                one.step()
            assert all(map(torch.equal, numbers(one), numbers(other)))
        step(one, t)
        step(other, t)
    assert all(map(torch.equal, numbers(one), numbers(other)))


@pytest.mark.parametrize("name", ["shampoo", "shampoo ema", "matrix_adagrad"])
@given(bad, st.booleans())
def test_where_no_one_waits_such_a_matrix_is_left_out(name: str, value: float, in_place: bool) -> None:
    level = ROOTS[name]()
    params = torch.zeros(2, 5, 4)
    state = start(level, params)
    _, state = level.step(torch.stack([gradient(0), gradient(1)]), state, Signal(1, params))
    shown = torch.stack([gradient(2), gradient(3)])
    want, good = level.step(shown, state, Signal(2, params))
    old = {path: leaf.clone() for path, leaf in leaves(state)}
    shown[1, 0, 0] = value
    if in_place:
        direction, new = level.step_(shown, state, Signal(2, params)), state
    else:
        direction, new = level.step(shown, state, Signal(2, params))
    torch.testing.assert_close(direction[0], want[0])
    assert torch.equal(direction[1], torch.zeros(5, 4))
    for path, leaf in leaves(new):
        torch.testing.assert_close(leaf[0], dict(leaves(good))[path][0])
        if not path.endswith("root"):  # made anew of the same matrix
            assert torch.equal(leaf[1], old[path][1])
        assert leaf.isfinite().all()


# -- random starts ---------------------------------------------------------------------------------------------------


def test_a_step_draws_nothing_from_torchs_generator() -> None:
    optimizer = made(levels.deep_momentum())
    before = torch.get_rng_state()
    step(optimizer, 0)
    assert torch.equal(torch.get_rng_state(), before)
    starts = [optimizer.state[param]["memory.W2"] for param in optimizer.param_groups[0]["params"]]
    assert not torch.equal(*starts)


@given(st.integers(0, 2**31), st.permutations(range(3)))
def test_a_random_start_is_of_torchs_seed_and_the_name_alone(seed: int, order: list[int]) -> None:
    def starts(order: list[int], also: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        torch.randn(also)  # what else the program draws
        named = [(f"w{i}", nn.Parameter(torch.ones(5, 4))) for i in order]
        optimizer = Nested(named, levels.deep_momentum(rule=levels.gd(), step_size=0.0))
        step(optimizer, 0)
        return {name: optimizer.state[param]["memory.W2"] for name, param in named}

    one, other = starts([0, 1, 2], 0), starts(order, 5)
    assert all(torch.equal(one[name], other[name]) for name in one)


# -- saved before ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [lambda level: level, lambda level: chain(levels.momentum(), level)])
def test_m3s_checkpoints_with_the_mean_square_load(wrap: Callable[[Level], Level]) -> None:
    one, other = made(wrap(levels.m3())), made(wrap(levels.m3()))
    for t in range(3):
        step(one, t)
        step(other, t + 5)
    saved = copy.deepcopy(one.state_dict())
    for state in saved["state"].values():
        key = next(key for key in state if key.endswith("rms"))
        state[key.replace("rms", "exp_avg_sq")] = state.pop(key).square()
    other.load_state_dict(saved)
    for a, b in zip(one.state.values(), other.state.values(), strict=True):
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=1e-6, atol=0)
