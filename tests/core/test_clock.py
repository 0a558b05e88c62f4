"""Clocks: what a period means, with a Python step count and with a tensor's."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import nestopt
from nestopt import levels
from nestopt.config import build, to_spec
from nestopt.core import Signal, advance, chain, nest, parallel, start
from nestopt.core.clock import advance_
from nestopt.core.tree import leaves
from nestopt.levels import adam, gd, momentum

STEPS = 13


def run(level, grads, as_tensor=False):
    state, out = start(level, grads[0]), []
    for t, grad in enumerate(grads, start=1):
        u, state = advance(level, grad, state, Signal(torch.tensor(t) if as_tensor else t, grad))
        out.append(u)
    return torch.stack(out), state


def make_grads(n=STEPS):
    return [torch.randn(3, 2, dtype=torch.float64) for _ in range(n)]


@given(st.integers(1, 6))
def test_a_clocked_level_sees_the_sums_of_whole_periods(period):
    grads = make_grads()
    got, _ = run(adam(period=period), grads)
    sums = [sum(grads[i : i + period]) for i in range(0, STEPS - period + 1, period)]
    want, _ = run(adam(), sums)
    for t in range(1, STEPS + 1):
        writes = t // period
        expected = want[writes - 1] if writes else torch.zeros_like(grads[0])
        torch.testing.assert_close(got[t - 1], expected, rtol=1e-12, atol=1e-12)


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 4))
def test_a_tensor_step_count_does_the_same(a, b, c):
    level = parallel(
        chain(momentum(0.9, period=a), adam(period=b), period=c),
        nest(momentum(0.5, period=b), adam(), period=a),
    )
    grads = make_grads()
    (int_out, int_state), (tensor_out, tensor_state) = run(level, grads), run(level, grads, as_tensor=True)
    torch.testing.assert_close(tensor_out, int_out, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(tensor_state, int_state, rtol=1e-9, atol=1e-9)


def test_clocks_within_clocks_multiply():
    grads = make_grads(12)
    got, _ = run(chain(gd(period=3), period=2), grads)
    want, _ = run(gd(period=6), grads)
    # the inner clock counts the outer one's writes, each a sum of two
    torch.testing.assert_close(got, want)


def test_order_of_levels_does_not_change_what_each_sees():
    grads = make_grads()
    fast_first, _ = run(parallel(fast=momentum(0.9), slow=momentum(0.9, period=4)), grads)
    slow_first, _ = run(parallel(slow=momentum(0.9, period=4), fast=momentum(0.9)), grads)
    torch.testing.assert_close(fast_first, slow_first, rtol=1e-12, atol=1e-12)


def test_a_step_between_writes_does_no_work():
    class Counting(type(gd())):
        def step(self, grad, state, signal):
            calls.append(signal.step)
            return grad, state

    calls = []
    run(Counting(period=4), make_grads(9))
    assert calls == [1, 2]


LEVELS = {
    "momentum": levels.momentum,
    "adam": levels.adam,
    "muon": lambda **clock: levels.muon(dtype="float64", **clock),
    "within": lambda **clock: chain(levels.momentum(0.5), parallel(levels.gd(), levels.gd(**clock))),
    "cms": lambda period, **clock: levels.cms(periods=(1, period), rule=levels.momentum(**clock)),
}


@pytest.mark.parametrize("name", LEVELS)
@given(st.integers(1, 4), st.integers(1, 10), st.booleans())
def test_a_clock_of_means_sees_the_sum_divided_by_its_period(name: str, period: int, steps: int, tensor: bool) -> None:
    mean, total = LEVELS[name](period=period, clock="mean"), LEVELS[name](period=period)
    grads = torch.randn(steps, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    state, other, own = (start(level, grads[0]) for level in (mean, total, mean))
    for t, grad in enumerate(grads, start=1):
        signal = Signal(torch.tensor(t) if tensor else t, grads[0])
        got, state = advance(mean, grad, state, signal)
        in_place = advance_(mean, grad.clone(), own, Signal(t, grads[0]))
        torch.testing.assert_close(in_place, got)
        if name in ("momentum", "adam", "muon"):
            want, other = advance(total, grad / period, other, signal)
            torch.testing.assert_close(got, want)
        if name == "within":
            _, other = advance(total, grad, other, signal)
            now = [dict(leaves(each)) for each in (state, other)]
            for path in (path for path in now[0] if path.endswith("clock_read")):
                torch.testing.assert_close(now[0][path] * period, now[1][path])
    assert build("level", to_spec(mean)) == mean
    assert build("level", to_spec(mean)) != total or name == "cms"


def test_a_memory_on_tokens_with_a_clock_of_means_takes_its_period_th_part() -> None:
    torch.manual_seed(0)
    mean = nestopt.layer(levels.linear_attention(period=3, clock="mean"), 8, heads=2)
    part = nestopt.layer(levels.linear_attention(period=3, lr=1 / 3), 8, heads=2)
    part.load_state_dict(mean.state_dict())
    x = torch.randn(2, 9, 8)
    torch.testing.assert_close(mean(x)[0], part(x)[0])


def test_another_clock_is_refused() -> None:
    with pytest.raises(ValueError, match=r"momentum: clock='maen' is not allowed.*Did you mean 'mean'"):
        levels.momentum(period=2, clock="maen")
