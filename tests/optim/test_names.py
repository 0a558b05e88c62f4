"""Parameters are who they are called: checkpoints in another order, groups that are added, frozen ones, engines."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nestopt
from nestopt.optim import Nested
from nestopt.optim.sharded.optimizer import Placement, Sharded
from nestopt.optim.sharded.saved import CheckpointMismatch

LEVELS = ["adamw", "momentum", "muon", "m3", "shampoo", "dgd", "deep_momentum"]


class Net(nn.Module):
    """Layers of one shape, so that crosswise would fit, in an order of one's choice."""

    def __init__(self, order: str = "abc") -> None:
        super().__init__()
        layers = {name: nn.Linear(4, 4) for name in "abc"}
        for name in order:
            self.add_module(name, layers[name])
        generator = torch.Generator().manual_seed(0)
        for name in "abc":
            for param in layers[name].parameters():
                param.data = torch.randn(param.shape, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x)))))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        model.zero_grad()
        model(torch.full((3, 4), 1.0 + step)).square().sum().backward()
        optimizer.step()


def same(one: nn.Module, other: nn.Module) -> None:
    theirs = dict(other.named_parameters())
    for name, param in one.named_parameters():
        assert torch.equal(param, theirs[name]), name


def made(model: nn.Module, level: Any, **options: Any) -> Nested:
    torch.manual_seed(0)
    return nestopt.optimizer(model, level, 0.01, route=lambda name, param: param.ndim > 1, **options)


def saved(*things: Any) -> Any:
    file = io.BytesIO()
    torch.save([thing.state_dict() for thing in things], file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# -- checkpoints -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["cba", "bca"])
@pytest.mark.parametrize("level", LEVELS)
def test_a_checkpoint_loads_into_parameters_of_another_order(level: str, order: str) -> None:
    one, other = Net(), Net(order)
    first = made(one, level)
    train(one, first, range(3))
    weights, state = saved(one, first)
    other.load_state_dict(weights)
    second = made(other, level)
    called = [list(group["param_names"]) for group in second.param_groups]
    second.load_state_dict(state)
    assert [group["param_names"] for group in second.param_groups] == called
    train(one, first, range(3, 6))
    train(other, second, range(3, 6))
    same(one, other)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, as it loads its compiler
@pytest.mark.parametrize("wrap", ["compiled", "parallel"])
def test_what_wraps_a_model_is_no_part_of_a_name(wrap: str) -> None:
    one, other = Net(), Net("cab")
    inside: nn.Module = torch.compile(one, backend="eager") if wrap == "compiled" else nn.DataParallel(one)  # type: ignore[assignment]
    first, second = made(inside, "adamw"), made(other, "adamw")
    train(one, first, range(2))
    weights, state = saved(one, first)
    other.load_state_dict(weights)
    second.load_state_dict(state)
    train(one, first, range(2, 4))
    train(other, second, range(2, 4))
    same(one, other)


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_torch_s_named_checkpoints_load_by_name(name: str) -> None:
    one, other = Net(), Net("cba")
    options: dict[str, Any] = {"momentum": 0.9} if name == "SGD" else {}
    first = getattr(torch.optim, name)(one.named_parameters(), 0.01, **options)
    second = getattr(nestopt.optim, name)(other.named_parameters(), 0.01, **options)
    train(one, first, range(3))
    weights, state = saved(one, first)
    other.load_state_dict(weights)
    second.load_state_dict(state)
    train(one, first, range(3, 6))
    train(other, second, range(3, 6))
    theirs = dict(other.named_parameters())
    for key, param in one.named_parameters():
        torch.testing.assert_close(param, theirs[key])


def test_groups_of_another_order_keep_their_settings() -> None:
    one, other = Net(), Net("cba")
    groups = {
        "a": {"params": [("a.weight", one.a.weight)], "lr": 0.1},
        "b": {"params": [("b.weight", one.b.weight)], "lr": 0.2, "stack": "adam"},
    }
    first = Nested(list(groups.values()), "momentum")
    train(one, first, range(2))
    theirs = [{**groups["b"], "lr": 1.0}, {**groups["a"], "lr": 1.0}]
    theirs[0]["params"], theirs[1]["params"] = [("b.weight", other.b.weight)], [("a.weight", other.a.weight)]
    second = Nested(theirs, "momentum")
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert [group["lr"] for group in second.param_groups] == [0.2, 0.1]
    other.load_state_dict(one.state_dict())
    train(one, first, range(2, 4))
    train(other, second, range(2, 4))
    same(one, other)


def test_names_of_which_none_is_the_same_say_nothing() -> None:
    """By place, as torch does."""
    one, other = Net(), Net()
    first = made(one, "adamw")
    train(one, first, range(2))
    renamed = nn.ModuleDict({"renamed": other})
    second = made(renamed, "adamw")
    second.load_state_dict(first.state_dict())
    other.load_state_dict(one.state_dict())
    train(one, first, range(2, 4))
    train(other, second, range(2, 4))
    same(one, other)


def test_what_does_not_fit_is_named() -> None:
    def of(**params: Tensor) -> Nested:
        return Nested([(name, nn.Parameter(param)) for name, param in params.items()], "momentum")

    one, two = torch.zeros(2, 2), torch.zeros(2, 2)
    first = of(a=one, b=two)
    for param in first.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    first.step()
    state = first.state_dict()
    with pytest.raises(ValueError, match=r"param_groups\[0\]: the checkpoint has no c, which this optimizer trains"):
        of(a=one, c=two).load_state_dict(state)
    with pytest.raises(ValueError, match=r"state\[1\]: the checkpoint has a state of b, which this optimizer has not"):
        of(a=one).load_state_dict(state)
    halves = Nested([{"params": [(name, nn.Parameter(torch.zeros(2, 2)))]} for name in "ab"], "momentum")
    halves.load_state_dict(state)  # both as the one group was
    with pytest.raises(ValueError, match=r"its parameters are in the groups \[0, 1\] of the checkpoint"):
        first.load_state_dict(halves.state_dict())


@pytest.mark.parametrize("level", LEVELS)
def test_freezing_changes_no_checkpoint(level: str) -> None:
    """What is frozen need not be in it; and what is in it may be frozen now."""
    one, other = Net(), Net()
    one.b.requires_grad_(False)
    first = Nested([(name, p) for name, p in one.named_parameters() if p.requires_grad and p.ndim > 1], level, 0.01)
    train(one, first, range(2))
    other.b.requires_grad_(False)
    second = Nested([(name, p) for name, p in other.named_parameters() if p.ndim > 1], level, 0.01)
    weights, state = saved(one, first)
    other.load_state_dict(weights)
    second.load_state_dict(state)
    other.c.requires_grad_(False)
    second.load_state_dict(saved(second)[0])
    other.requires_grad_(True)
    train(other, second, range(2, 3))
    assert int(second.state[other.c.weight]["step"]) == 3
    assert int(second.state[other.b.weight]["step"]) == 1


def attached(model: nn.Module) -> Sharded:
    sharded = Sharded(made(model, "muon", weight_decay=0.5))
    sharded.attach([Placement(i, g["params"], g["params"]) for i, g in enumerate(sharded.param_groups)])
    return sharded


def test_engines_leave_frozen_parameters_alone_and_load_by_name() -> None:
    one, other = Net(), Net("bac")
    for model in (one, other):
        model.b.requires_grad_(False)
    first, second = attached(one), attached(other)
    assert "b.weight" not in first.models
    assert any(row.name == "b.weight" and row.frozen for row in first.explain())
    train(one, first, range(2))
    other.load_state_dict(one.state_dict())
    second.load_state_dict(first.state_dict())
    train(one, first, range(2, 4))
    train(other, second, range(2, 4))
    same(one, other)
    assert torch.equal(one.b.weight, Net().b.weight)
    other.b.requires_grad_(True)
    with pytest.raises(CheckpointMismatch, match="other groups"):
        attached(other).load_state_dict(first.state_dict())


# -- groups that are added ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("how", ["list", "one", "iterator", "values"])
def test_added_parameters_are_called_as_the_model_does(level: str, how: str) -> None:
    model = Net()
    late = model.c
    del model.c
    optimizer = made(model, level)
    model.c = late
    weight: Any = {"list": [late.weight], "one": late.weight, "iterator": iter([late.weight])}.get(how)
    weight = {"c": late.weight}.values() if weight is None else weight
    optimizer.add_param_group({"params": weight, "lr": 0.5})
    optimizer.add_param_group({"params": [stray := nn.Parameter(torch.zeros(4, 4))]})
    assert optimizer.param_groups[-2]["param_names"] == ["c.weight"]
    place = f"group {len(optimizer.param_groups) - 1}, parameter 0"
    assert [row.name for row in optimizer.explain()][-2:] == ["c.weight", place]
    before = late.weight.detach().clone()
    stray.grad = torch.ones(4, 4)
    train(model, optimizer, range(2))
    assert not torch.equal(late.weight, before)
    assert stray.any()
    optimizer.load_state_dict(saved(optimizer)[0])


def test_a_model_that_is_gone_calls_nobody() -> None:
    model = Net()
    optimizer = made(model, "adamw")
    del model
    optimizer.add_param_group({"params": torch.ones(2, requires_grad=True)})
    assert optimizer.param_groups[-1]["param_names"] == ["group 2, parameter 0"]
    Nested([torch.ones(2, requires_grad=True)]).add_param_group({"params": torch.ones(3, requires_grad=True)})
