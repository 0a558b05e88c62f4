"""What is known beside a gradient has that gradient's life: born, summed, skipped, cleared and saved with it."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nestopt
from nestopt.core.level import Level
from nestopt.levels import adam, dgd, ggd, momentum, muon
from nestopt.optim import Nested
from tests.optim.watched import Cubic

LEVELS = {
    "dgd": dgd(),
    "dgd of momentum": dgd(momentum(), mode="paper"),
    "dgd of muon": dgd(muon(), mode="paper"),
    "dgd exact, normalised": dgd(adam(), solver="exact", normalize_inputs=True, mode="paper"),
    "ggd": ggd(),
    "ggd cubic": ggd(Cubic()),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


def batch(step: int) -> Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(step))


def made(level: Level, period: int = 1, **options: Any) -> tuple[nn.Module, Nested]:
    model = network()
    return model, nestopt.optimizer(model, level, 0.02, groups=[{"match": "weight", "period": period}], **options)


def train(model: nn.Module, optimizer: Nested, steps: range, before: Callable[[int], None] | None = None) -> None:
    for step in steps:
        if before is not None:
            before(step)
        optimizer.zero_grad()
        model(batch(step)).square().mean().backward()
        optimizer.step()


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


# -- cleared -----------------------------------------------------------------------------------------------------------

CLEARED: dict[str, Callable[[nn.Module, Nested], object]] = {
    "optimizer": lambda model, optimizer: optimizer.zero_grad(),
    "optimizer to zero": lambda model, optimizer: optimizer.zero_grad(set_to_none=False),
    "model": lambda model, optimizer: model.zero_grad(),
    "model to zero": lambda model, optimizer: model.zero_grad(set_to_none=False),
    "one by one": lambda model, optimizer: [setattr(p, "grad", None) for p in model.parameters()],
}


def skipped(model: nn.Module, optimizer: Nested, x: Tensor) -> None:
    (model(x).sum() * float("inf")).backward()
    optimizer.step()


def abandoned(model: nn.Module, optimizer: Nested, x: Tensor) -> None:
    model(x).square().sum().backward()


def skipped_by_a_scaler(model: nn.Module, optimizer: Nested, x: Tensor) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(model(x).sum() * float("inf")).backward()
    assert scaler.step(optimizer) is None


@pytest.mark.parametrize("how", CLEARED)
@pytest.mark.parametrize("lost", [skipped, abandoned, skipped_by_a_scaler])
@pytest.mark.parametrize("period", [1, 2])
@pytest.mark.parametrize("level", LEVELS)
def test_a_step_that_was_not_taken_leaves_nothing(level: str, period: int, lost: Any, how: str) -> None:
    model, optimizer = made(LEVELS[level], period, on_nonfinite="skip")
    twin, other = made(LEVELS[level], period)

    def before(step: int) -> None:
        CLEARED[how](model, optimizer)
        if step in (0, 1, 4):
            lost(model, optimizer, 3 * batch(100 + step))
            CLEARED[how](model, optimizer)

    for step in range(6):
        before(step)
        model(batch(step)).square().mean().backward()
        optimizer.step()
    train(twin, other, range(6))
    assert same(model, twin)


@pytest.mark.parametrize("level", LEVELS)
def test_a_gradient_set_to_zero_takes_its_rows_with_it(level: str) -> None:
    """A step with zeros is what it is where nothing was ever shown; one with zeros that the layers brought is not."""
    moved = []
    for zeroed, bare in [(True, False), (True, True), (False, False)]:
        model, optimizer = made(LEVELS[level])
        if bare:
            optimizer._watcher = None
        model(batch(0)).sum().backward() if zeroed else (0.0 * model(batch(0)).sum()).backward()
        for p in model.parameters():
            p.grad.zero_()
        optimizer.step()
        optimizer.step()
        moved.append(model)
    assert same(moved[0], moved[1])
    assert same(moved[0], moved[2]) == (level == "dgd")  # which rests where the gradient is zero, whatever was shown


# -- born --------------------------------------------------------------------------------------------------------------


def saliency(model: nn.Module, x: Tensor) -> None:
    torch.autograd.grad(model(x).square().sum(), x)


def only_to_inputs(model: nn.Module, x: Tensor) -> None:
    model(x).square().sum().backward(inputs=[x])


def other_weights(model: nn.Module, x: Tensor) -> None:
    torch.autograd.grad(model(x).square().sum(), list(model.parameters()))


def failing(model: nn.Module, x: Tensor) -> None:
    def fail(grad: Tensor) -> None:
        raise ArithmeticError

    y = model[:3](x)
    y.register_hook(fail)
    with pytest.raises(ArithmeticError):
        model[3:](y).sum().backward()
    model.zero_grad()


ASIDE = [(aside, between) for aside in (saliency, only_to_inputs, other_weights) for between in (False, True)]


@pytest.mark.parametrize(("aside", "between"), [*ASIDE, (failing, False)])
@pytest.mark.parametrize("level", LEVELS)
def test_a_pass_that_brings_the_weights_no_gradient_counts_for_nothing(level: str, between: bool, aside: Any) -> None:
    found = []
    for looks in (True, False):
        model, optimizer = made(LEVELS[level])
        for step in range(3):
            optimizer.zero_grad()
            for part in range(2):
                if looks and part == between:
                    aside(model, (5 * batch(50 + step)).requires_grad_())
                model(batch(2 * step + part)).square().mean().backward()
            optimizer.step()
        found.append(model)
    assert same(*found)


@pytest.mark.parametrize("level", LEVELS)
def test_a_penalty_on_the_inputs_gradient_counts_its_rows_once(level: str) -> None:
    """The pass to the inputs does not count, the one of the penalty does."""
    model, optimizer = made(LEVELS[level])
    x = batch(0).requires_grad_()
    (g,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    g.square().sum().backward()
    assert optimizer._watcher is not None
    for i in (0, 2):
        totals = optimizer._watcher.totals(model[i].weight)
        assert totals is not None
        assert totals["n"] == 5


@pytest.mark.filterwarnings("ignore:Using backward")  # torch's own, of create_graph
@pytest.mark.parametrize("level", LEVELS)
def test_a_gradient_with_a_graph_is_added_up_too(level: str) -> None:
    found = []
    for graph in (False, True):
        model, optimizer = made(LEVELS[level])
        for step in range(3):
            model(batch(step)).square().mean().backward(create_graph=graph)
        optimizer.step()
        found.append(model)
    for p, q in zip(*(m.parameters() for m in found), strict=True):
        torch.testing.assert_close(p, q)


# -- summed and used ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
def test_micro_batches_are_one_batch(level: str) -> None:
    model, optimizer = made(LEVELS[level])
    twin, other = made(LEVELS[level])
    optimizer.tell_loss_scale(0.5)
    for step in range(3):
        parts = batch(2 * step), batch(2 * step + 1)
        optimizer.zero_grad()
        for part in parts:
            (model(part).square().mean() / 2).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1e9)  # in place; nobody minds
        optimizer.step()
        other.zero_grad()
        twin(torch.cat(parts)).square().mean().backward()
        other.step()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
            q.data.copy_(p)


@pytest.mark.parametrize("level", LEVELS)
def test_a_gradient_that_is_used_twice_has_its_rows_twice(level: str) -> None:
    """And goes on adding up, as it does in torch where nobody clears it."""
    model, optimizer = made(LEVELS[level])
    twin, other = made(LEVELS[level])
    model(batch(0)).square().mean().backward()
    optimizer.step()
    state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    twin(batch(0)).square().mean().backward()
    twin.load_state_dict(state[0])
    other.load_state_dict(state[1])
    for net, own in ((model, optimizer), (twin, other)):
        own.step()
        net(batch(1)).square().mean().backward()
        own.step()
    assert same(model, twin)


@pytest.mark.parametrize("level", LEVELS)
def test_a_closure_is_a_loop(level: str) -> None:
    model, optimizer = made(LEVELS[level])
    twin, other = made(LEVELS[level])
    for step in range(3):

        def closure(step: int = step) -> Tensor:
            model.zero_grad()
            loss = model(batch(step)).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
    train(twin, other, range(3))
    assert same(model, twin)


@pytest.mark.parametrize("first", [True, False], ids=["hooked first", "watched first"])
@pytest.mark.parametrize("level", LEVELS)
def test_steps_within_the_backward_pass(level: str, first: bool) -> None:
    model, (twin, other) = network(), made(LEVELS[level])
    of = dict(zip(twin.parameters(), model.parameters(), strict=True))
    owner: dict[Tensor, Nested] = {}

    def step(param: Tensor) -> None:
        owner[param].step()
        param.grad = None

    def hook() -> None:
        for param in model.parameters():
            param.register_post_accumulate_grad_hook(step)

    if first:
        hook()
    for group in other.param_groups:
        for param in group["params"]:
            owner[of[param]] = Nested([of[param]], other.level(group), group["lr"])
            owner[of[param]].watch(model)
    if not first:
        hook()
    for i in range(3):
        model(batch(i)).square().mean().backward()
    train(twin, other, range(3))
    assert same(model, twin)


def test_another_gradient_in_its_place_is_stepped_without_and_said(caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = made(dgd())
    model(batch(0)).sum().backward()
    before = model[0].weight.detach().clone()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    torch.testing.assert_close(model[0].weight, before - 0.02)
    assert "dgd has not seen the inputs of 0.weight, 2.weight" in caplog.text


@pytest.mark.parametrize("level", ["dgd", "ggd cubic"])
def test_parameters_added_later_are_watched(level: str) -> None:
    model = network()
    groups = [{"params": [layer.weight], "lr": 0.02} for layer in (model[0], model[2])]
    optimizer = Nested(groups[:1], LEVELS[level])
    optimizer.watch(model)
    optimizer.add_param_group(groups[1])
    twin = network()
    other = Nested([twin[0].weight, twin[2].weight], LEVELS[level], 0.02)
    other.watch(twin)
    train(model, optimizer, range(2))
    train(twin, other, range(2))
    assert same(model, twin)


# -- saved -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("conv", [False, True], ids=["linear", "grouped convolution"])
@pytest.mark.parametrize("level", LEVELS)
def test_half_a_period_is_saved(level: str, conv: bool) -> None:
    def start() -> tuple[nn.Module, Nested]:
        model = nn.Sequential(nn.Conv1d(6, 4, 1, groups=2), nn.Flatten(), network()[2:]) if conv else network()
        if conv:
            model[2][0] = nn.Linear(4, 8)
        torch.manual_seed(1)
        for p in model.parameters():
            nn.init.normal_(p, std=0.3)
        return model, nestopt.optimizer(model, LEVELS[level], 0.02, groups=[{"match": "weight", "period": 3}])

    def go(model: nn.Module, optimizer: Nested, steps: range) -> None:
        for step in steps:
            optimizer.zero_grad()
            x = batch(step)
            model(x.unsqueeze(-1) if conv else x).square().mean().backward()
            optimizer.step()

    model, optimizer = start()
    go(model, optimizer, range(5))
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    twin, other = start()
    twin.load_state_dict(weights)
    other.load_state_dict(state)
    for net, own in ((model, optimizer), (twin, other)):
        go(net, own, range(5, 10))
    assert same(model, twin)


def test_half_a_period_of_a_checkpoint_without_inputs_loads() -> None:
    """Those that were saved before there were any."""
    model, optimizer = made(LEVELS["dgd of momentum"], 2)
    train(model, optimizer, range(1))
    state = copy.deepcopy(optimizer.state_dict())
    for own in state["state"].values():
        for key in [key for key in own if key.startswith("inputs_sum.")]:
            del own[key]
    made(LEVELS["dgd of momentum"], 2)[1].load_state_dict(state)
    some = next(own for own in optimizer.state_dict()["state"].values() if "inputs_sum.wxx" in own)
    some["inputs_sum.wxx"] = torch.zeros(2)
    state["state"][0] |= {"inputs_sum.n": torch.tensor(1)}
    with pytest.raises(ValueError, match=r"missing.*inputs_sum"):
        made(LEVELS["dgd of momentum"], 2)[1].load_state_dict(state)
