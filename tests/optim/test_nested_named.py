"""Optimizers by name that torch does not have: the level of that name, with its fields in the groups."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nestopt
from nestopt import levels
from nestopt.core import Level
from nestopt.optim import DGD, M3, DeepMomentum, DeltaMomentum, Nested, Shampoo

SAME: list[tuple[type[Nested], dict[str, Any], Level]] = [
    (M3, {"alpha": 0.3, "period": 2, "betas": (0.9, 0.99, 0.8)}, levels.m3((0.9, 0.99, 0.8), 0.3, 2)),
    (DeltaMomentum, {"zeta": 0.5, "normalize": "unit"}, levels.delta_momentum(0.9, 0.5, "unit")),
    (DeepMomentum, {}, levels.deep_momentum()),
    (Shampoo, {"beta": 0.5, "mode": "ema"}, levels.shampoo(0.5, mode="ema")),
]


def tensors() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 3, generator=generator).requires_grad_() for _ in range(2)]


def feed(optimizer: Nested, steps: range) -> list[Tensor]:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator)
        optimizer.step()
    return params


@pytest.mark.parametrize(("cls", "given", "level"), SAME, ids=lambda value: getattr(value, "__name__", ""))
def test_it_is_its_level(cls: type[Nested], given: dict[str, Any], level: Level) -> None:
    torch.manual_seed(0)  # the MLP of deep momentum
    named = feed(cls(tensors(), lr=0.1, weight_decay=0.1, **given), range(5))
    torch.manual_seed(0)
    plain = feed(Nested(tensors(), level, lr=0.1, weight_decay=0.1), range(5))
    for a, b in zip(named, plain, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("cls", "given", "level"), SAME, ids=lambda value: getattr(value, "__name__", ""))
def test_checkpoints_copies_and_pickles(cls: type[Nested], given: dict[str, Any], level: Level) -> None:
    first = cls(tensors(), lr=0.1, **given)
    feed(first, range(3))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    loaded = cls([param.detach().clone().requires_grad_() for param in first.param_groups[0]["params"]], lr=0.7)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    copies = [loaded, copy.deepcopy(first), pickle.loads(pickle.dumps(first))]
    wanted = feed(first, range(3, 6))
    for other in copies:
        assert all(torch.equal(a, b) for a, b in zip(feed(other, range(3, 6)), wanted, strict=True))


def test_a_group_may_have_its_own_numbers() -> None:
    a, b = tensors()
    together = M3([{"params": [a], "alpha": 0.0}, {"params": [b], "lr": 0.5}], lr=0.1)
    feed(together, range(4))
    alone = feed(M3([tensors()[0]], lr=0.1, alpha=0.0), range(4))
    assert not torch.equal(a, b)
    torch.testing.assert_close(a, alone[0], rtol=0, atol=0)


def test_bad_values_are_refused() -> None:
    with pytest.raises(ValueError, match="alpha=-1"):
        M3(tensors(), alpha=-1)
    with pytest.raises(ValueError, match="period=0"):
        M3(tensors(), period=0)
    with pytest.raises(ValueError, match="takes matrices"):
        Shampoo([torch.zeros(3, requires_grad=True)])


def layer() -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    return nn.Linear(4, 3, bias=False).double(), torch.randn(8, 4).double(), torch.randn(8, 3).double()


def test_dgd_is_the_proximal_step() -> None:
    """W+ = argmin mean ½‖V x - (W x - n d)‖² + ‖V - W‖² / (2 lr), by its normal equations."""
    model, x, wanted = layer()
    before, lr = model.weight.detach().clone(), 0.3
    optimizer = DGD(model.parameters(), lr=lr, model=model)
    y = model(x)
    y.retain_grad()
    (0.5 * (y - wanted).square().sum(1).mean()).backward()
    optimizer.step()
    gram, eye = x.mT @ x / len(x), torch.eye(4, dtype=torch.float64)
    d = y.grad
    assert d is not None
    expected = torch.linalg.solve(gram + eye / lr, (before @ gram + before / lr - d.mT @ x).mT).mT
    torch.testing.assert_close(model.weight.detach(), expected, rtol=1e-10, atol=1e-12)


def test_zero_grad_forgets_inputs_too() -> None:
    model, x, wanted = layer()
    twin = copy.deepcopy(model)
    optimizers = [DGD(each.parameters(), lr=0.1, model=each) for each in (model, twin)]
    (model(x * 100) - wanted).square().mean().backward()
    optimizers[0].zero_grad()
    for each, optimizer in zip((model, twin), optimizers, strict=True):
        (each(x) - wanted).square().mean().backward()
        optimizer.step()
    assert torch.equal(model.weight, twin.weight)


def test_the_factory_watches(caplog: pytest.LogCaptureFixture) -> None:
    model, x, wanted = layer()
    twin = copy.deepcopy(model)
    one, other = DGD(model.parameters(), lr=0.1, model=model), nestopt.optimizer(twin, "dgd", lr=0.1)
    for each, optimizer in ((model, one), (twin, other)):
        (each(x) - wanted).square().mean().backward()
        optimizer.step()
    assert torch.equal(model.weight, twin.weight)
    assert not caplog.records


def test_dgd_says_what_it_has_not_seen(caplog: pytest.LogCaptureFixture) -> None:
    model, x, wanted = layer()
    optimizer = DGD(model.named_parameters(), lr=0.1)
    (model(x) - wanted).square().mean().backward()
    before = model.weight.detach().clone()
    optimizer.step()
    assert "dgd has not seen the inputs" in caplog.text
    assert model.weight.grad is not None
    torch.testing.assert_close(model.weight.detach(), before - 0.1 * model.weight.grad)


def test_where_inputs_can_not_be_had() -> None:
    weights = [layer()[0].weight]
    with pytest.raises(ValueError, match="capturable=True"):
        Nested(weights, "dgd", capturable=True)
    with pytest.raises(ValueError, match="negate the loss"):
        Nested(weights, levels.ggd(value="sign"), maximize=True)


def test_skipped_steps_are_counted() -> None:
    param = torch.ones(2, requires_grad=True)
    optimizer = Nested([param], "gd", lr=0.1, on_nonfinite="skip")
    for value in (1.0, float("nan"), float("inf"), 1.0):
        param.grad = torch.tensor([value, 1.0])
        optimizer.step()
    assert optimizer.metrics()["skipped"] == 2
    torch.testing.assert_close(param.detach(), torch.full((2,), 0.8))


@pytest.mark.parametrize("cls", [M3, DeltaMomentum, Shampoo, DGD])
def test_defaults_are_those_of_the_level(cls: Any) -> None:
    own, made = inspect.signature(cls).parameters, cls.made_of()
    for name, field in cls.fields.items():
        want = "gd" if field == "of" else getattr(made, field)
        assert own[name].default == want, name


@pytest.mark.parametrize("cls", [M3, DeltaMomentum, DeepMomentum, Shampoo, DGD])
def test_every_argument_is_explained(cls: Any) -> None:
    words = inspect.getdoc(cls) or ""
    for name in inspect.signature(cls).parameters:
        assert words.count(f"\n    {name}: ") == 1, name
    assert "\nRaises:\n" in words


def test_a_class_of_ones_own_may_be_derived() -> None:
    class Slower(M3):
        """M3 with a slower slow memory."""

        def __init__(self, params: Any, **more: Any) -> None:
            super().__init__(params, period=32, **more)

    optimizer = Slower(tensors(), alpha=0.1)
    assert optimizer.level(optimizer.param_groups[0]) == levels.m3(alpha=0.1, slow_period=32)


def test_a_group_with_a_period_keeps_its_inputs_through_zero_grad() -> None:
    """Its gradients' sum goes on, and what belongs to them with it."""
    model, x, wanted = layer()
    twin = copy.deepcopy(model)
    for each, forget in ((model, True), (twin, False)):
        optimizer = Nested([{"params": [each.weight], "period": 2}], levels.dgd(), lr=0.1)
        optimizer.watch(each)
        for scale in (1.0, 3.0):
            (each(x * scale) - wanted).square().mean().backward()
            optimizer.step()
            if forget:
                optimizer.zero_grad()
            else:
                each.weight.grad = None
    assert not torch.equal(model.weight, layer()[0].weight)
    assert torch.equal(model.weight, twin.weight)
