"""The second moment against loops over entries, and against the optimizers that it is."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nestopt import ConfigError, build, registry
from nestopt.core import Signal, chain, parallel
from nestopt.core.clock import advance, start
from nestopt.core.gates import bind
from nestopt.core.part import FieldError
from nestopt.levels import adam, gd, m3, momentum, muon, newton_schulz, second_moment, shampoo
from nestopt.optim import Nested
from tests.levels.gradient.tools import bytes_per_parameter, randoms, run, same


@pytest.mark.parametrize("bias_correction", [False, True])
def test_an_average_entry_by_entry(bias_correction: bool) -> None:
    grads, beta2, eps = randoms(3, 4), 0.8, 1e-2
    directions = run(second_moment(beta2, eps, bias_correction), grads)
    for i in range(3):
        for j in range(4):
            h = 0.0
            for t, g in enumerate(grads, start=1):
                h = beta2 * h + (1 - beta2) * float(g[i, j]) ** 2
                root = math.sqrt(h / (1 - beta2**t) if bias_correction else h)
                assert float(directions[t - 1, i, j]) == pytest.approx(float(g[i, j]) / (root + eps), rel=1e-12)


def test_it_sees_the_gradient_and_scales_the_direction() -> None:
    grads, h = randoms(3, 4), torch.zeros(3, 4, dtype=torch.float64)
    inner = run(newton_schulz(), grads)
    for g, got, direction in zip(
        grads, run(second_moment(eps=0.0, of=newton_schulz(), mode="sum", sees="gradient"), grads), inner, strict=True
    ):
        h = h + g**2
        same(got, direction / h.sqrt())


HOLD = {"cautious": "of", "soap": "of", "preconditioned_momentum": "P", "weight_average": "inner"}
ALONE = [name for name in registry.names("level") if name not in ("chain", "parallel", "nest", "clip")]
HOLDING = [{"level": name, key: of} for name, key in HOLD.items() for of in ("newton_schulz", "momentum")]


@pytest.mark.parametrize("spec", [*ALONE, *HOLDING], ids=str)
def test_a_level_knows_whether_it_forgets_scale(spec) -> None:
    """`clip` does where it clips, and says that it does not."""
    level = bind(build("level", spec))
    if level.of_tokens or "inputs" in level.needs:
        pytest.skip("it sees no gradients alone")
    outs = []
    for scale in (1.0, 1e3):
        torch.manual_seed(0)
        param = torch.randn(6, 6, dtype=torch.float64)
        state, seen = start(level, param), []
        for t in range(1, 25):
            u, state = advance(level, scale * torch.randn(6, 6, dtype=torch.float64), state, Signal(t, param, 0.01))
            seen.append(u)
        outs.append(torch.stack(seen))
    assert torch.allclose(*outs, rtol=1e-3, atol=1e-6) == level.forgets_scale


@pytest.mark.parametrize("of", [newton_schulz(), adam(), muon(), chain(momentum(), newton_schulz()), shampoo(), m3()])
def test_it_sees_a_direction_that_has_forgotten_scale(of) -> None:
    assert of.forgets_scale
    grads, h = randoms(3, 4), torch.zeros(3, 4, dtype=torch.float64)
    inner = run(of, grads)
    for t, (got, u) in enumerate(zip(run(second_moment(0.9, 0.0, of=of), grads), inner, strict=True), start=1):
        h = 0.9 * h + 0.1 * u**2
        same(got, (u / (h / (1 - 0.9**t)).sqrt()).clamp(-3, 3), 1e-9)
    same(run(second_moment(of=of), [1e6 * g for g in grads]), run(second_moment(of=of), grads), 1e-3)


@pytest.mark.parametrize("of", [gd(), momentum(), parallel(gd(), adam()), m3(mode="paper")])
def test_of_another_it_sees_the_gradient(of) -> None:
    assert not of.forgets_scale
    grads = randoms(3, 4)
    assert torch.equal(run(second_moment(of=of), grads), run(second_moment(of=of, sees="gradient"), grads))


def test_adam_is_two_memories_in_parallel() -> None:
    grads, beta1 = randoms(3, 4), 0.7
    average = momentum(beta1, dampening=beta1)
    plain = second_moment(0.9, 1e-3, bias_correction=False, of=average)
    same(run(plain, grads), run(adam((beta1, 0.9), 1e-3, bias_correction=False), grads))
    corrected = run(second_moment(0.9, 1e-3, of=average), grads)
    start = 1 - beta1 ** torch.arange(1.0, len(grads) + 1, dtype=torch.float64).reshape(-1, 1, 1)
    same(corrected / start, run(adam((beta1, 0.9), 1e-3), grads))


def test_without_memory_it_is_the_sign() -> None:
    grads = randoms(3, 4)
    signs = torch.stack(grads).sign()
    same(run(second_moment(0.0, 0.0), grads), signs)
    same(run(adam((0.0, 0.0), 0.0), grads), signs)


TWINS = {
    "adagrad": (second_moment(eps=1e-3, mode="sum"), torch.optim.Adagrad, {"eps": 1e-3}),
    "rmsprop": (second_moment(0.9, 1e-3, bias_correction=False), torch.optim.RMSprop, {"alpha": 0.9, "eps": 1e-3}),
}


@pytest.mark.parametrize("name", TWINS)
def test_it_is_the_optimizer_of_torch(name: str) -> None:
    level, make, options = TWINS[name]
    ours, theirs = (torch.nn.Parameter(torch.ones(3, 4, dtype=torch.float64)) for _ in range(2))
    optimizers = Nested([ours], level, lr=0.1), make([theirs], lr=0.1, **options)
    for grad in randoms(3, 4):
        for param, optimizer in zip((ours, theirs), optimizers, strict=True):
            param.grad = grad.clone()
            optimizer.step()
        same(ours.detach(), theirs.detach())


@given(scale=st.floats(1e-6, 1e6), beta2=st.floats(0.0, 0.999), mode=st.sampled_from(["ema", "sum"]))
def test_the_scale_of_gradients_is_forgotten(scale: float, beta2: float, mode: str) -> None:
    grads = randoms(2, 3, count=4)
    level = second_moment(**({"beta2": beta2} if mode == "ema" else {}), eps=0.0, mode=mode)
    same(run(level, [scale * g for g in grads]), run(level, grads), 1e-9)


@pytest.mark.parametrize("eps", [0.0, 1e-8])
def test_zeros_give_zeros_and_a_finite_derivative(eps: float) -> None:
    zeros = torch.zeros(3, dtype=torch.float64)
    assert torch.equal(run(second_moment(eps=eps), [zeros, zeros]), torch.zeros(2, 3, dtype=torch.float64))
    grad, level = zeros.clone().requires_grad_(), second_moment(eps=1e-8)
    run_once, _ = level.step(grad, level.init(zeros), Signal(1))
    (slope,) = torch.autograd.grad(run_once.sum(), grad)
    assert slope.isfinite().all()


def test_its_state_is_one_number_a_parameter() -> None:
    assert bytes_per_parameter(second_moment(), 5, 3) == 4
    assert bytes_per_parameter(second_moment(of=momentum()), 5, 3) == 8


def test_it_is_elementwise_where_what_it_scales_is() -> None:
    assert second_moment().is_elementwise
    assert second_moment(of=adam()).is_elementwise
    assert not second_moment(of=newton_schulz()).is_elementwise


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: second_moment(1.0), ["beta2=1.0", "[0, 1)"]),
        (lambda: second_moment(eps=-1.0), ["eps=-1.0"]),
        (lambda: second_moment(sees="gradients"), ["sees='gradients'", "Did you mean 'gradient'"]),
        (lambda: second_moment(mode="mean"), ["mode='mean'", "'ema', 'sum'"]),
        (lambda: second_moment(0.9, mode="sum"), ["beta2=0.9", "no effect", "mode='sum'"]),
        (lambda: second_moment(of="momentun"), ["of: 'momentun'", "no level is called", "'momentum'"]),
        (lambda: second_moment(over="columns"), ["over='columns'", "'entries', 'rows', 'factored'"]),
    ],
)
def test_wrong_values_say_what_is_allowed(make, words) -> None:
    with pytest.raises((FieldError, ConfigError)) as error:
        make()
    for word in words:
        assert word in str(error.value)


def test_gd_is_what_it_scales_by_default() -> None:
    grads = randoms(3, 4)
    assert torch.equal(run(second_moment(of=gd()), grads), run(second_moment(), grads))


@pytest.mark.parametrize("mode", ["ema", "sum"])
def test_squares_that_share_a_number(mode: str) -> None:
    grads, keep, take = randoms(4, 3), 0.8 if mode == "ema" else 1.0, 0.2 if mode == "ema" else 1.0
    given = {"beta2": 0.8} if mode == "ema" else {}
    rows, columns = [0.0] * 4, [0.0] * 3
    got = {over: run(second_moment(eps=1e-2, mode=mode, over=over, **given), grads) for over in ("rows", "factored")}
    for t, g in enumerate(grads):
        start = 1 - keep ** (t + 1) if mode == "ema" else 1.0
        rows = [keep * r + take * sum(float(x) ** 2 for x in g[i]) / 3 for i, r in enumerate(rows)]
        columns = [keep * c + take * sum(float(x) ** 2 for x in g[:, j]) / 4 for j, c in enumerate(columns)]
        for i in range(4):
            for j in range(3):
                by_row, factored = rows[i], rows[i] * columns[j] / (sum(rows) / 4)
                for over, h in (("rows", by_row), ("factored", factored)):
                    want = float(g[i, j]) / (math.sqrt(h / start) + 1e-2)
                    assert float(got[over][t, i, j]) == pytest.approx(want, rel=1e-10)


def test_factors_are_exact_for_squares_that_are_a_product() -> None:
    a, b = torch.rand(5, 1, dtype=torch.float64) + 0.1, torch.rand(1, 4, dtype=torch.float64) + 0.1
    grads = [torch.randn(5, 4).sign().double() * a * b for _ in range(6)]
    same(run(second_moment(over="factored"), grads), run(second_moment(), grads), 1e-9)
    assert bytes_per_parameter(second_moment(over="factored"), 100, 50) == 4 * 150 / 5000
    assert bytes_per_parameter(second_moment(over="rows"), 100, 50) == 4 * 100 / 5000
    with pytest.raises(ValueError, match=r"second_moment takes matrices"):
        Nested([torch.nn.Parameter(torch.zeros(3))], second_moment(over="rows"))
