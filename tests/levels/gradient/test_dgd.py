"""Delta gradient descent against the proximal problem it solves, with raw inputs and errors in float64."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import nestopt
from nestopt.config import build, to_spec
from nestopt.core import AssociativeMemory, Level, Signal, advance, start
from nestopt.core.clock import advance_
from nestopt.core.memories import Vector
from nestopt.core.objectives import Dot
from nestopt.core.part import FieldError
from nestopt.core.retentions import Decay
from nestopt.levels import adam, dgd, gd, ggd, momentum, muon
from nestopt.nn import layer as make_layer
from nestopt.optim.layer_inputs.watcher import Watcher
from tests.levels.gradient.surprises import F64, direction_of, linear_case, shown, told

letter = functools.partial(dgd, mode="paper")


# -- corrected values --------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 12),
    into=st.integers(1, 8),
    out=st.integers(1, 5),
    power=st.floats(-3, 3),
    delta=st.sampled_from([1.0, 0.3]),
)
def test_it_is_the_proximal_step_to_what_the_weights_answer_corrected(
    n: int, into: int, out: int, power: float, delta: float
) -> None:
    """argmin over V of mean δ/2 ‖V x - (W x - s/δ)‖² + ½‖V - W‖²/lr."""
    level, lr = dgd(delta=delta), 10**power
    layer, watcher, x, s = linear_case(n, into, out, level)
    weight = layer.weight.detach()
    moved = weight - lr * direction_of(level, layer, watcher, lr)
    values = x @ weight.mT - s / delta
    left = delta * x.mT @ x / n + torch.eye(into, dtype=F64) / lr
    right = weight / lr + delta * values.mT @ x / n
    torch.testing.assert_close(moved, torch.linalg.solve(left, right.mT).mT, rtol=1e-8, atol=1e-8)


def test_of_one_row_it_is_the_normalised_step() -> None:
    layer, watcher, x, s = linear_case(1, 5, 4, dgd())
    want = torch.outer(s[0], x[0]) / (1 + 0.6 * x[0] @ x[0])
    torch.testing.assert_close(direction_of(dgd(), layer, watcher, 0.6), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("of", [gd(), momentum(0.8), adam()], ids=repr)
def test_it_rests_where_the_level_within_does(of: Level) -> None:
    layer, watcher, _, _ = linear_case(6, 5, 4, dgd(of))
    still = torch.zeros_like(layer.weight)
    inputs = told(watcher, layer.weight)
    u, _ = advance(dgd(of), still, start(dgd(of), still), Signal(1, layer.weight.detach(), lr=0.5, inputs=inputs))
    assert not u.any()


def classified(spec: Level, lr: float, steps: int = 60) -> float:
    """The loss of a small network on pictures of ten noisy shapes, all nonnegative."""
    generator = torch.Generator().manual_seed(0)
    shapes, labels = torch.rand(10, 32, generator=generator), torch.randint(10, (256,), generator=generator)
    x = (shapes[labels] + 0.3 * torch.randn(256, 32, generator=generator)).clamp(0, 1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = nestopt.optimizer(model, spec, lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
    return float(F.cross_entropy(model(x), labels).detach())


def test_it_trains_at_the_rate_of_gradient_descent_and_beyond() -> None:
    assert classified(letter(), 0.5) > 1.5
    assert classified(dgd(), 0.5) < 0.2
    best = min(classified(gd(), lr) for lr in (0.5, 1.0, 2.0, 4.0))
    assert classified(dgd(), 8.0) < 0.5 * best
    assert classified(dgd(of=momentum()), 0.05) < 1.2 * classified(momentum(), 0.05)


def test_the_letter_says_what_it_is() -> None:
    with pytest.warns(UserWarning, match="dgd: mode='paper' is eq. 57 to the letter"):
        letter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert dgd().mode == "corrected"


def test_what_was_saved_before_there_were_two_modes_goes_on_with_its_own() -> None:
    model = nn.Linear(3, 2)
    for built in (nestopt.optimizer(model, letter(), lr=0.1), nestopt.optim.DGD(model.parameters(), 0.1, mode="paper")):
        saved = built.state_dict()
        for group in saved["param_groups"]:
            stack = group.get("stack", group)
            if not isinstance(stack, str):
                assert stack.pop("mode") == "paper"
        now = (
            nestopt.optimizer(model, "dgd", lr=0.1) if "stack" in group else nestopt.optim.DGD(model.parameters(), 0.1)
        )
        now.load_state_dict(saved)
        assert [now.level(group) for group in now.param_groups] == [built.level(group) for group in built.param_groups]
    assert to_spec(dgd()) == "dgd"


def test_a_checkpoint_of_the_letter_is_told_what_it_asks_for() -> None:
    torch.manual_seed(0)
    ends, x = [], torch.randn(8, 3)
    start = nn.Linear(3, 2)
    for spec in (letter(), dgd()):
        model = copy.deepcopy(start)
        optimizer = nestopt.optimizer(model, spec, lr=0.1)
        optimizer.load_state_dict(nestopt.optimizer(copy.deepcopy(start), letter(), lr=0.1).state_dict())
        model(x).square().mean().backward()
        optimizer.step()
        ends.append(model.weight.detach())
    assert torch.equal(*ends)


# -- the letter --------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 12),
    into=st.integers(1, 8),
    out=st.integers(1, 5),
    power=st.floats(-3, 3),
    delta=st.sampled_from([1.0, 0.3]),
)
def test_exact_is_the_proximal_step(n: int, into: int, out: int, power: float, delta: float) -> None:
    """argmin over V of mean ½ δ‖V x‖² + <s, V x> + ½‖V - W‖²/lr: for δ = 1 that of mean ½‖V x + s‖²."""
    level, lr = letter(delta=delta, solver="exact"), 10**power
    layer, watcher, x, s = linear_case(n, into, out, level)
    weight = layer.weight.detach()
    moved = weight - lr * direction_of(level, layer, watcher, lr)
    left = delta * x.mT @ x / n + torch.eye(into, dtype=F64) / lr
    right = weight / lr - s.mT @ x / n
    torch.testing.assert_close(moved, torch.linalg.solve(left, right.mT).mT, rtol=1e-8, atol=1e-8)


def test_exact_is_found_by_descent_on_the_problem_itself() -> None:
    """The same by no formula at all."""
    level, lr = letter(solver="exact"), 0.7
    layer, watcher, x, s = linear_case(9, 4, 3, level)
    weight = layer.weight.detach()
    moved = weight - lr * direction_of(level, layer, watcher, lr)
    v = weight.clone().requires_grad_()
    solver = torch.optim.LBFGS(
        [v], max_iter=200, tolerance_grad=1e-13, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def problem() -> Tensor:
        solver.zero_grad()
        loss = 0.5 * (x @ v.mT + s).square().sum(1).mean() + 0.5 * (v - weight).square().sum() / lr
        loss.backward()
        return loss

    solver.step(problem)
    torch.testing.assert_close(moved, v.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("delta", [1.0, 0.25])
@pytest.mark.parametrize("n", [3, 30])
def test_explicit(n: int, delta: float) -> None:
    level, lr = letter(delta=delta), 0.3
    layer, watcher, x, s = linear_case(n, 5, 4, level)
    weight = layer.weight.detach()
    decay = sum(torch.outer(weight @ row, row) for row in x) / n
    g = sum(torch.outer(error, row) for error, row in zip(s, x, strict=True)) / n
    energy = sum(float(row @ row) for row in x) / n
    want = (g + delta * decay) / (1 + lr * delta * energy)
    torch.testing.assert_close(direction_of(level, layer, watcher, lr), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("solver", ["explicit", "exact"])
def test_one_row_is_eq_57(solver: Any) -> None:
    level, lr = letter(solver=solver), 0.6
    layer, watcher, x, s = linear_case(1, 5, 4, level)
    weight, row = layer.weight.detach(), x[0]
    rate = lr / (1 + lr * row @ row)
    want = weight @ (torch.eye(5, dtype=F64) - rate * torch.outer(row, row)) - rate * torch.outer(s[0], row)
    torch.testing.assert_close(weight - lr * direction_of(level, layer, watcher, lr), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("solver", ["explicit", "exact"])
def test_normalized_inputs(solver: Any) -> None:
    level, lr = letter(solver=solver, normalize_inputs=True), 0.6
    layer, watcher, x, _ = linear_case(7, 5, 4, level)
    assert layer.weight.grad is not None
    unit = x / x.norm(dim=1, keepdim=True)
    gram = unit.mT @ unit / 7
    total = layer.weight.grad + layer.weight.detach() @ gram
    inverse = torch.linalg.inv(torch.eye(5, dtype=F64) + lr * gram) if solver == "exact" else 1 / (1 + lr)
    want = total @ inverse if solver == "exact" else total * inverse
    torch.testing.assert_close(direction_of(level, layer, watcher, lr), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [3, 9], ids=["few patches", "many patches"])
@pytest.mark.parametrize("solver", ["explicit", "exact"])
def test_grouped_convolutions_are_layers_side_by_side(solver: Any, size: int) -> None:
    level, lr = letter(solver=solver), 0.6
    whole = nn.Conv2d(4, 6, 2, groups=2).double()
    x = torch.randn(1, 4, size, size, dtype=F64)
    target = torch.randn_like(whole(x).detach())
    got = direction_of(level, whole, shown(whole, level, x, target), lr)
    for group in range(2):
        half = nn.Conv2d(2, 3, 2).double()
        at = slice(3 * group, 3 * group + 3)
        with torch.no_grad():
            half.weight.copy_(whole.weight[at])
            half.bias.copy_(whole.bias[at])  # type: ignore[union-attr, index]
        # the mean over both halves' outputs: half of that over one
        watcher = shown(half, level, x[:, 2 * group : 2 * group + 2], target[:, at], scale=0.5)
        torch.testing.assert_close(got[at], direction_of(level, half, watcher, lr), rtol=1e-10, atol=1e-10)


def test_around_a_matrix_level_on_a_convolution() -> None:
    """The optimizer shows matrix levels a kernel as `[out, rest]`."""
    level, lr = letter(muon(dtype="float64")), 0.1
    conv = nn.Conv2d(4, 6, 3, groups=2).double()
    x = torch.randn(2, 4, 6, 6, dtype=F64)
    watcher = shown(conv, level, x, torch.randn(2, 6, 4, 4, dtype=F64))
    inputs, grad, weight = told(watcher, conv.weight), conv.weight.grad, conv.weight.detach()
    assert inputs is not None
    assert grad is not None
    assert inputs.wxx is not None
    flat = grad.flatten(1)
    got, _ = advance(level, flat, start(level, flat), Signal(1, weight.flatten(1), lr=lr, inputs=inputs))
    plain, _ = advance(muon(dtype="float64"), flat, start(level.of, flat), Signal(1))
    want = (plain.reshape(grad.shape) + inputs.wxx) / (1 + lr * inputs.mean_square)
    torch.testing.assert_close(got, want.flatten(1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("of", [gd(), momentum(0.8), adam(), momentum(0.5, period=2)], ids=repr)
@pytest.mark.parametrize("solver", ["explicit", "exact"])
def test_wraps_any_level_step_by_step(solver: Any, of: Level) -> None:
    """u = (u of `of` + δ W G)(...)⁻¹ at each step of a run, in place and not."""
    level, lr, weight = letter(of, 0.5, solver), 0.2, torch.randn(4, 5, dtype=F64)
    layer = nn.Linear(5, 4, bias=False).double()
    watcher = Watcher(layer, {layer.weight: level})
    ours, own, inner = start(level, weight), start(level, weight), start(of, weight)
    for t in range(1, 7):
        x = torch.randn(8, 5, dtype=F64)
        layer.weight.grad = None
        F.mse_loss(layer(x), torch.randn(8, 4, dtype=F64)).backward()
        w, g = layer.weight.detach(), layer.weight.grad
        assert g is not None
        signal = Signal(t, w, lr=lr, inputs=told(watcher, layer.weight))
        kept = copy.deepcopy((g, w, signal.inputs))
        u, ours = advance(level, g, ours, signal)
        in_place = advance_(level, g, own, signal)
        torch.testing.assert_close(in_place, u, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(own, ours, rtol=1e-10, atol=1e-10)
        for a, b in zip((g, w, *vars(kept[2]).values()), (*kept[:2], *vars(signal.inputs).values()), strict=True):
            assert a is b is None or torch.equal(a, b), "a step changes what it was given"
        plain, inner = advance(of, g, inner, Signal(t, w))
        gram = x.mT @ x / 8
        eye = torch.eye(5, dtype=F64)
        below = eye + lr * 0.5 * (gram if solver == "exact" else gram.trace() * eye)
        torch.testing.assert_close(u @ below, plain + 0.5 * w @ gram, rtol=1e-9, atol=1e-9)
        with torch.no_grad():
            layer.weight -= lr * u


@pytest.mark.parametrize("of", [gd(), adam()], ids=repr)
def test_without_delta_or_inputs_it_is_the_level_within(of: Level) -> None:
    grads = [torch.randn(4, 3, dtype=F64) for _ in range(4)]
    layer, watcher, _, _ = linear_case(6, 3, 4, letter())
    inputs = told(watcher, layer.weight)
    for level, seen in [(letter(of, delta=0.0), inputs), (letter(of), None)]:
        state, inner = start(level, grads[0]), start(of, grads[0])
        for t, g in enumerate(grads, start=1):
            got, state = advance(level, g, state, Signal(t, g, lr=0.1, inputs=seen))
            want, inner = advance(of, g, inner, Signal(t, g))
            assert torch.equal(got, want)


def test_a_rate_that_is_a_tensor() -> None:
    layer, watcher, _, _ = linear_case(6, 3, 4, letter(solver="exact"))
    inputs, g = told(watcher, layer.weight), layer.weight.grad
    assert g is not None
    for level in (letter(), letter(solver="exact")):
        a, _ = advance(level, g, start(level, g), Signal(1, g, lr=0.1, inputs=inputs))
        b, _ = advance(level, g, start(level, g), Signal(1, g, lr=torch.tensor(0.1, dtype=F64), inputs=inputs))
        torch.testing.assert_close(a, b, rtol=1e-14, atol=0)


def test_correlated_inputs_do_not_make_it_diverge() -> None:
    """A regression on inputs of length 10 at a rate at which gradient descent explodes."""
    torch.manual_seed(0)
    x = 3 + torch.randn(64, 9, dtype=F64)
    y = x @ torch.randn(9, 2, dtype=F64)

    def run(level: Level) -> float:
        layer = nn.Linear(9, 2, bias=False).double()
        watcher = Watcher(layer, {layer.weight: level})
        state = start(level, layer.weight.detach())
        for t in range(1, 31):
            layer.weight.grad = None
            loss = F.mse_loss(layer(x), y)
            loss.backward()
            assert layer.weight.grad is not None
            signal = Signal(t, layer.weight.detach(), lr=0.1, inputs=told(watcher, layer.weight))
            u, state = advance(level, layer.weight.grad, state, signal)
            with torch.no_grad():
                layer.weight -= 0.1 * u
        return float(loss.detach())

    assert run(gd()) > 1e3
    assert run(letter()) < 1e3
    assert run(letter(solver="exact")) < 1e3


# -- as any level ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: dgd(delta=-1.0), ["dgd: delta=-1.0", "[0"]),
        (lambda: dgd(solver="exakt"), ["solver='exakt'", "Did you mean 'exact'"]),
        (lambda: dgd(mode="papr"), ["mode='papr'", "Did you mean 'paper'"]),
        (lambda: dgd(period=4), ["period=4", "inputs", "parameter group"]),
        (lambda: ggd(period=4), ["period=4", "inputs", "parameter group"]),
        (lambda: ggd(value="signs"), ["value='signs'", "Did you mean 'sign'"]),
    ],
)
def test_wrong_values_say_what_is_allowed(make: Callable[[], Level], words: list[str]) -> None:
    with pytest.raises(FieldError) as error:
        make()
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("level", [dgd(), ggd()], ids=lambda level: level.label)
def test_it_says_that_it_needs_a_layer(level: Level) -> None:
    assert level.needs == {"shape", "inputs"}
    with pytest.raises(ValueError, match=f"{level.label} can't run on tokens.*on gradients"):
        make_layer(level, 8, 2)(torch.randn(1, 3, 8))
    g = torch.randn(4, 3)
    with pytest.raises(ValueError, match=f"{level.label} needs a learning rate.*in an optimizer"):
        advance(level, g, start(level, g), Signal(1, g))
    rule = AssociativeMemory(memory=Vector(), rule=level)
    with pytest.raises(FieldError, match=r"rule=.* not allowed as a memory's rule with the memory vector"):
        advance(rule, g, start(rule, g), Signal(1, g, lr=0.1))


def test_exact_without_its_sums_says_so() -> None:
    layer, watcher, _, _ = linear_case(6, 3, 4, letter())
    with pytest.raises(ValueError, match="Gram matrix"):
        direction_of(letter(solver="exact"), layer, watcher, 0.1)


@pytest.mark.parametrize(
    "level",
    [
        dgd(),
        letter(momentum(0.5), 0.5, "exact", True),
        ggd(),
        ggd(Dot(), "sign", Decay(0.9)),
    ],
    ids=repr,
)
def test_specs(level: Level) -> None:
    assert build("level", to_spec(level)) == level
