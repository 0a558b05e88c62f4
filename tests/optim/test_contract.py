"""What every stack must do as a `torch.optim.Optimizer`."""

from __future__ import annotations

import copy
import io
import logging
import pickle
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import nestopt
from nestopt import levels
from nestopt.core import Level, Signal, State, chain, nest, parallel
from nestopt.core.memories import Window
from nestopt.optim import Adam, Muon, Nested, torch_named
from nestopt.optim.execute import flat
from nestopt.optim.execute.update import SUM

MATRIX = [(6, 5), (6, 5), (4, 7)]
ANY = [(6, 5), (6, 5), (4,), (4,), (), (2, 3, 2)]


class Recent(Level):
    """Steps along the gradient before this one: its direction is a tensor that it then writes over."""

    def init(self, param: Tensor) -> State:
        return {"last": torch.zeros_like(param), "before": torch.zeros_like(param)}

    def step(self, grad: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        # `grad` itself becomes state, and one state tensor becomes another: all of it is allowed
        return state["before"], {"last": grad, "before": state["last"]}


class Branching(Level):
    """Looks at the numbers to decide, which `vmap` can't."""

    scale: float = 2.0

    def init(self, param: Tensor) -> State:
        return {"count": torch.zeros((), dtype=param.dtype)}

    def step(self, grad: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        up = bool(grad.sum() > 0)
        return grad * (self.scale if up else 1.0), {"count": state["count"] + up}


STACKS: dict[str, Callable[[], Level]] = {
    "gd": levels.gd,
    "momentum": levels.momentum,
    "adam": lambda: levels.adam(amsgrad=True),
    "adamw": levels.adamw,
    "delta_momentum": levels.delta_momentum,
    "deep_momentum": levels.deep_momentum,
    "muon": lambda: levels.muon(dtype="float64"),
    "attention": lambda: levels.attention(memory=Window(3)),
    "linear_attention": levels.linear_attention,
    "cms": lambda: levels.cms(periods=(1, 3), rule=levels.momentum()),
    "cms of muon": lambda: levels.cms(periods=(1, 3), rule=levels.muon(dtype="float64")),
    "three deep": lambda: chain(
        slow=levels.momentum(0.5, period=3),
        fast=parallel(direct=levels.gd(), nested=nest(levels.gd(period=4), levels.momentum()), weights=[0.5, 1.0]),
        last=levels.adam(),
    ),
    "on a clock": lambda: levels.momentum(period=3),
    "of one's own": Recent,
    "branching": Branching,
}

every_stack = pytest.mark.parametrize("name", STACKS)


def shapes(name: str) -> list[tuple[int, ...]]:
    return MATRIX if "muon" in name else ANY


def make(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **options: Any) -> Nested:
    """An optimizer of the stack on named parameters."""
    random = torch.Generator().manual_seed(seed)
    named = [
        (f"p{i}", torch.randn(shape, dtype=torch.float64, generator=random).to(dtype).requires_grad_())
        for i, shape in enumerate(shapes(name))
    ]
    return Nested(named, STACKS[name](), **{"lr": 0.05, "weight_decay": 0.1, **options})


def weights(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def feed(optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Step on gradients that depend on the step only."""
    for t in steps:
        random = torch.Generator().manual_seed(1000 + t)
        for param in weights(optimizer):
            param.grad = torch.randn(param.shape, dtype=torch.float64, generator=random).to(param.dtype)
        optimizer.step()


def numbers(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything that an optimizer holds, copied."""
    found = {}
    for i, param in enumerate(weights(optimizer)):
        found[f"{i}"] = param.detach().clone()
        for key, value in optimizer.state.get(param, {}).items():
            found[f"{i}.{key}"] = value.clone()
    return found


def assert_same(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> None:
    """Bit for bit."""
    one, other = numbers(a), numbers(b)
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert value.dtype == other[key].dtype, key
        assert torch.equal(value, other[key]), key


def through_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# -- checkpoints -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"period": 3}], ids=["", "group with period"])
@every_stack
def test_resumes_bit_for_bit(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    one = make(name, dtype, **options)
    feed(one, range(8))  # in the middle of every period
    other = make(name, dtype, seed=1, **options)
    with torch.no_grad():
        for a, b in zip(weights(one), weights(other), strict=True):
            b.copy_(a)
    other.load_state_dict(through_file(one.state_dict()))
    assert_same(one, other)
    feed(one, range(8, 16))
    feed(other, range(8, 16))
    assert_same(one, other)
    assert all(
        value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        for state in other.state.values()
        for value in state.values()
        if value.ndim
    )


def test_keys_are_readable() -> None:
    optimizer = make("three deep", period=2)
    feed(optimizer, range(1))
    param = weights(optimizer)[0]
    assert set(optimizer.state[param]) == {
        "step",
        SUM,
        "slow.clock_sum",
        "slow.clock_read",
        "slow.momentum",
        "fast.nested.inner.momentum",
        "fast.nested.start.momentum",
        "last.exp_avg",
        "last.exp_avg_sq",
    }
    assert optimizer.state_dict()["param_groups"][0]["stack"]["levels"]["slow"] == {
        "level": "momentum",
        "beta": 0.5,
        "period": 3,
    }
    assert optimizer.state_dict()["param_groups"][0]["param_names"][0] == "p0"


@every_stack
def test_a_loaded_dict_is_not_shared(name: str) -> None:
    one, other = make(name, period=2), make(name, period=2)
    feed(one, range(5))
    saved = copy.deepcopy(one.state_dict())
    kept = copy.deepcopy(saved)
    other.load_state_dict(saved)
    feed(other, range(5, 9))
    assert repr(saved["param_groups"]) == repr(kept["param_groups"])
    for index, state in kept["state"].items():
        assert all(torch.equal(value, saved["state"][index][key]) for key, value in state.items())


def broken(saved: dict[str, Any], **change: Any) -> dict[str, Any]:
    return {**saved, **change}


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "fewer groups": (lambda s: broken(s, param_groups=[]), "0 parameter groups, this optimizer 1"),
    "fewer parameters": (
        lambda s: broken(s, param_groups=[{**s["param_groups"][0], "params": [0]}]),
        "the checkpoint has 1 parameters, this optimizer 6",
    ),
    "a parameter of no group": (lambda s: broken(s, state={**s["state"], 77: s["state"][0]}), r"state\[77\]"),
    "another shape": (
        lambda s: broken(s, state={**s["state"], 0: {**s["state"][0], "momentum": torch.zeros(2, 2)}}),
        r"state\[0\].momentum: has shape \(2, 2\) in the checkpoint, \(6, 5\) here",
    ),
    "another number of dimensions": (
        lambda s: broken(s, state={**s["state"], 5: {**s["state"][5], "momentum": torch.zeros(12)}}),
        r"state\[5\].momentum: has shape \(12,\)",
    ),
    "a sum of another shape": (
        lambda s: broken(s, state={**s["state"], 0: {**s["state"][0], SUM: torch.zeros(3)}}),
        rf"state\[0\].{SUM}: has shape \(3,\)",
    ),
    "no tensor": (
        lambda s: broken(s, state={**s["state"], 0: {**s["state"][0], "momentum": 1.0}}),
        r"state\[0\].momentum: is float",
    ),
    "a missing key": (
        lambda s: broken(s, state={**s["state"], 1: {"step": torch.ones(())}}),
        r"state\[1\].*missing \['momentum'\]",
    ),
    "an unknown key": (
        lambda s: broken(s, state={**s["state"], 1: {**s["state"][1], "other": torch.ones(())}}),
        r"state\[1\].*unknown \['other'\]",
    ),
    "another stack with the same keys": (
        lambda s: broken(s, param_groups=[{**s["param_groups"][0], "stack": "delta_momentum"}]),
        r"param_groups\[0\].stack: the checkpoint was saved with another stack",
    ),
    "an unknown stack": (
        lambda s: broken(s, param_groups=[{**s["param_groups"][0], "stack": "mommentum"}]),
        "Did you mean 'momentum'",
    ),
    "a value out of range": (lambda s: broken(s, param_groups=[{**s["param_groups"][0], "lr": -1.0}]), "lr=-1.0"),
    "another optimizer": (
        lambda s: broken(s, param_groups=[{"lr": 0.1, "params": s["param_groups"][0]["params"]}]),
        "saved by another optimizer",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_checkpoint_that_does_not_fit_is_refused_and_changes_nothing(case: str) -> None:
    change, message = REFUSED[case]
    optimizer, twin = make("momentum", period=2), make("momentum", period=2)
    feed(optimizer, range(3))
    feed(twin, range(3))
    settings = repr(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(change(copy.deepcopy(optimizer.state_dict())))
    assert repr(optimizer) == settings
    assert_same(optimizer, twin)
    feed(optimizer, range(3, 6))
    feed(twin, range(3, 6))
    assert_same(optimizer, twin)


def test_a_checkpoint_brings_its_settings() -> None:
    one, other = make("momentum", lr=0.3), make("momentum")
    one.param_groups[0]["stack"] = levels.momentum(0.5)
    other.load_state_dict(one.state_dict())
    assert other.param_groups[0]["lr"] == 0.3
    assert other.param_groups[0]["stack"] == levels.momentum(0.5)


def test_an_unregistered_level_must_be_the_same() -> None:
    one = make("branching")
    feed(one, range(2))
    assert "scale=2.0" in one.state_dict()["param_groups"][0]["stack"]["unregistered"]
    other = Nested([("p", torch.ones(2, requires_grad=True)) for _ in range(1)], Branching(3.0))
    with pytest.raises(ValueError, match=r"scale=2.0.*scale=3.0"):
        other.load_state_dict(
            {**one.state_dict(), "param_groups": [{**one.state_dict()["param_groups"][0], "params": [0]}]}
        )


@every_stack
def test_copies_and_pickles_go_on_alike(name: str) -> None:
    one = make(name, period=2)
    feed(one, range(5))
    others = [copy.deepcopy(one)]
    if name not in ("of one's own", "branching"):  # their classes are in a test module, which can't be imported by name
        others.append(pickle.loads(pickle.dumps(one)))
    feed(one, range(5, 12))
    for other in others:
        feed(other, range(5, 12))
        assert_same(one, other)


# -- parameters and gradients ------------------------------------------------------------------------------------------


@every_stack
def test_parameters_without_a_gradient_are_not_touched(name: str) -> None:
    optimizer = make(name)
    feed(optimizer, range(2))
    first, *others = weights(optimizer)
    frozen = torch.ones(6, 5)
    optimizer.add_param_group({"params": [("frozen", frozen)]})
    fresh = torch.ones(6, 5, requires_grad=True)
    optimizer.add_param_group({"params": [("fresh", fresh)]})
    optimizer.zero_grad()
    before = numbers(optimizer)
    first.grad = torch.ones_like(first)
    optimizer.step()
    after = numbers(optimizer)
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(value, after[key]) == (not key.startswith("0")) or key.startswith("0.")
    assert torch.equal(frozen, torch.ones(6, 5))
    assert fresh not in optimizer.state
    assert frozen not in optimizer.state
    assert len(others) + 1 == len(optimizer.state)


@every_stack
def test_gradients_are_neither_changed_nor_kept(name: str) -> None:
    for options in ({}, {"period": 2}, {"maximize": True}):
        optimizer = make(name, **options)
        for t in range(4):
            kept = []
            for i, param in enumerate(weights(optimizer)):
                param.grad = torch.randn(param.shape) + t + i
                kept.append(param.grad.clone())
            optimizer.step()
            for param, grad in zip(weights(optimizer), kept, strict=True):
                assert torch.equal(param.grad, grad)
                memory = {
                    value.untyped_storage().data_ptr() for value in optimizer.state[param].values() if value.numel()
                }
                assert param.grad.untyped_storage().data_ptr() not in memory
                assert param.untyped_storage().data_ptr() not in memory


def test_state_written_over_is_read_first() -> None:
    # by hand: the direction at step t is the gradient of step t - 2
    for stacked in (True, False):
        made = [torch.zeros(3, requires_grad=True) for _ in range(2 if stacked else 1)]
        optimizer = Nested(made, Recent(), lr=1.0)
        for grad in (1.0, 10.0, 100.0, 1000.0):
            for param in made:
                param.grad = torch.full((3,), grad)
            optimizer.step()
        for param in made:
            assert torch.equal(param.detach(), torch.full((3,), -11.0))
            assert torch.equal(optimizer.state[param]["last"], torch.full((3,), 1000.0))
            assert torch.equal(optimizer.state[param]["before"], torch.full((3,), 100.0))


def test_sparse_gradient_is_refused_by_name_before_anything_has_changed() -> None:
    table = nn.Embedding(4, 3, sparse=True)
    first = torch.ones(3, requires_grad=True)
    optimizer = Nested([{"params": [("first", first)]}, {"params": [("table", table.weight)]}], "momentum")
    first.grad = torch.ones(3)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="table has a sparse gradient"):
        optimizer.step()
    assert torch.equal(first, torch.ones(3))
    assert not optimizer.state


def complex_ones(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, dtype=torch.complex64, requires_grad=True)


@pytest.mark.parametrize("make", [lambda p: Nested(p, "adam"), lambda p: Nested(p, ["momentum", "shampoo"]), Muon])
def test_complex_parameters_are_refused_by_name(make: Any) -> None:
    with pytest.raises(ValueError, match=r"phase is torch.complex64; levels .*; nestopt.optim.SGD, Adam"):
        make([("phase", complex_ones(3, 2))])
    with pytest.raises(ValueError, match=r"group 0, parameter 1 is torch.complex64"):
        make([torch.ones(2, 2, requires_grad=True), complex_ones(3, 2)])


def test_complex_parameters_are_refused_where_no_step_takes_them() -> None:
    with pytest.raises(ValueError, match=r"capturable=True, for phase of shape \[3\]: it is complex"):
        Adam([("phase", complex_ones(3))], capturable=True)
    with pytest.raises(ValueError, match=r"phase: give torch\.view_as_real"):
        nestopt.optim.functional_step("gd", {"phase": complex_ones(3)}, {"phase": torch.ones(3)})
    with pytest.raises(ValueError, match=r"places is torch.int64; levels take real"):
        Nested([("places", torch.ones(3, dtype=torch.int64))], "gd")


def test_a_parameter_given_twice_is_refused() -> None:
    param = torch.ones(3, requires_grad=True)
    with pytest.warns(UserWarning, match="duplicate"), pytest.raises(ValueError, match="in the group twice"):
        Nested([param, param], "gd")
    with pytest.raises(ValueError, match="more than one parameter group"):
        Nested([{"params": [param]}, {"params": [param]}], "gd")


@every_stack
def test_memory_layout_does_not_matter(name: str) -> None:
    plain = torch.randn(6, 4, 3, 2)
    layouts = {
        "channels_last": plain.clone().to(memory_format=torch.channels_last),
        "transposed": plain.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        "strided": torch.zeros(12, 4, 3, 2)[::2].copy_(plain),
    }
    assert not any(tensor.is_contiguous() for tensor in layouts.values())
    results = []
    for tensor in [plain, *layouts.values()]:
        torch.manual_seed(3)  # a level may start at random numbers
        param = tensor.requires_grad_()
        optimizer = Nested([param], STACKS[name](), lr=0.05)
        feed(optimizer, range(5))
        results.append(param.detach().contiguous())
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
@every_stack
def test_empty_tensors_are_left_alone(name: str, shape: tuple[int, ...]) -> None:
    if "muon" in name and len(shape) < 2:
        shape = (0, 0)
    optimizer = Nested([torch.zeros(shape, requires_grad=True), torch.ones(2, 2, requires_grad=True)], STACKS[name]())
    feed(optimizer, range(4))
    empty, full = weights(optimizer)
    assert empty not in optimizer.state
    assert not torch.equal(full, torch.ones(2, 2))
    optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("name", ["muon", "cms of muon"])
def test_a_convolution_is_its_matrix(name: str) -> None:
    kernel = torch.randn(6, 2, 3, 3)
    as_kernel = Nested([kernel.clone().requires_grad_()], STACKS[name](), lr=0.1)
    as_matrix = Nested([kernel.flatten(1).clone().requires_grad_()], STACKS[name](), lr=0.1)
    for _ in range(7):
        grad = torch.randn(6, 2, 3, 3)
        weights(as_kernel)[0].grad, weights(as_matrix)[0].grad = grad, grad.flatten(1)
        as_kernel.step()
        as_matrix.step()
    assert torch.equal(weights(as_kernel)[0].flatten(1), weights(as_matrix)[0])


@every_stack
def test_maximize_is_descent_on_the_negative(name: str) -> None:
    up, down = make(name, maximize=True, weight_decay=0.0), make(name, weight_decay=0.0)
    for optimizer, sign in ((up, 1), (down, -1)):
        torch.manual_seed(0)  # a level may start at random numbers
        for _ in range(5):
            for param in weights(optimizer):
                param.grad = sign * torch.randn(param.shape)
            optimizer.step()
    assert_same(up, down)


def test_weight_decay_is_decoupled() -> None:
    optimizer = Nested([torch.full((2,), 3.0, dtype=torch.float64, requires_grad=True)], "adam", 0.1, 0.5)
    param = weights(optimizer)[0]
    param.grad = torch.tensor([2.0, -5.0], dtype=torch.float64)
    optimizer.step()
    torch.testing.assert_close(param.detach(), 3 * (1 - 0.05) - 0.1 * param.grad.sign(), rtol=1e-7, atol=0)


# -- many tensors at once ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=str)
@every_stack
def test_stacked_equals_one_by_one(
    name: str, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = make(name, dtype)
    torch.manual_seed(0)
    feed(together, range(10))
    monkeypatch.setattr(flat, "SMALL", -1)
    alone = make(name, dtype)
    torch.manual_seed(0)
    feed(alone, range(10))
    one, other = numbers(alone), numbers(together)
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert float((value - other[key]).norm()) <= tolerance * float(value.norm()), key


def test_a_level_that_can_not_be_batched_runs_one_by_one(caplog: pytest.LogCaptureFixture) -> None:
    optimizer = Nested([torch.zeros(3, requires_grad=True) for _ in range(3)], Branching(), lr=1.0)
    with caplog.at_level(logging.INFO, "nestopt"):
        for _ in range(2):
            for param, grad in zip(weights(optimizer), (1.0, -1.0, 5.0), strict=True):
                param.grad = torch.full((3,), grad)
            optimizer.step()
    assert [param[0].item() for param in weights(optimizer)] == [-4.0, 2.0, -20.0]
    assert [optimizer.state[param]["count"].item() for param in weights(optimizer)] == [2, 0, 2]
    assert len([r for r in caplog.records if "branching can't be batched" in r.getMessage()]) == 1


def test_the_fallback_of_one_level_is_not_that_of_another(caplog: pytest.LogCaptureFixture) -> None:
    groups = [
        {"params": [torch.zeros(3, requires_grad=True) for _ in range(2)], "stack": chain(only)}
        for only in (Branching(), levels.delta_momentum())
    ]
    optimizer = Nested(groups)
    with caplog.at_level(logging.INFO, "nestopt"):
        feed(optimizer, range(2))
    assert len(caplog.records) == 1


class Wrong(Level):
    """Makes each of the mistakes that are caught."""

    mistake: str = ""

    def init(self, param: Tensor) -> State:
        return {"step": torch.zeros_like(param)} if self.mistake == "key" else {}

    def step(self, grad: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        return {"shape": grad.mT, "dtype": grad.bfloat16()}[self.mistake], state


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(("mistake", "message"), [("shape", r"shape \(.*3, 2\) for .* \(.*2, 3\)"), ("key", "'step'")])
def test_mistakes_of_a_level_are_named(mistake: str, message: str, count: int) -> None:
    optimizer = Nested([torch.zeros(2, 3, requires_grad=True) for _ in range(count)], Wrong(mistake))
    with pytest.raises(ValueError, match=f"wrong: .*{message}"):
        feed(optimizer, range(1))


def test_a_narrow_direction_does_not_narrow_the_parameter() -> None:
    param = torch.full((2, 3), 1.0001, requires_grad=True)
    optimizer = Nested([param], Wrong("dtype"), lr=0.0)
    feed(optimizer, range(1))
    assert torch.equal(param.detach(), torch.full((2, 3), 1.0001))


# -- torch's interface -------------------------------------------------------------------------------------------------


def test_zero_grad() -> None:
    optimizer = make("momentum")
    feed(optimizer, range(1))
    optimizer.zero_grad(set_to_none=False)
    assert all(torch.equal(param.grad, torch.zeros_like(param)) for param in weights(optimizer))
    optimizer.zero_grad()
    assert all(param.grad is None for param in weights(optimizer))
    assert optimizer.step() is None


@pytest.mark.parametrize("grad_enabled", [True, False])
def test_closure(grad_enabled: bool) -> None:
    param = torch.tensor([3.0], requires_grad=True)
    optimizer = Nested([param], "gd", lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        return loss

    with torch.set_grad_enabled(grad_enabled):
        assert optimizer.step(closure).item() == 9.0
    assert param.item() == pytest.approx(3 - 0.1 * 6)


def test_a_group_has_its_own_stack() -> None:
    optimizer = make("momentum")
    added = torch.ones(4, 4, requires_grad=True)
    optimizer.add_param_group({"params": [("added", added)], "stack": {"level": "muon", "dtype": "float32"}, "lr": 0.5})
    feed(optimizer, range(1))
    assert optimizer.param_groups[1]["stack"] == levels.muon(dtype="float32")
    # muon's step has singular values near 1, whatever the gradient
    values = torch.linalg.svdvals((torch.ones(4, 4) - added.detach()) / 0.5 - 0.1)
    assert values.min() > 0.3
    assert values.max() < 1.6


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"stack": "mommentum"}, r"param_groups\[1\].stack: 'mommentum' .* Did you mean 'momentum'"),
        ({"stack": "muon"}, r"muon takes matrices, and added has shape \(3,\)"),
        ({"lr": -1}, "lr=-1 is not allowed"),
        ({"lr": torch.ones(2)}, "lr has 2 elements"),
        ({"weight_decay": -1}, "weight_decay=-1 is not allowed"),
        ({"period": 0}, "period=0 is not allowed"),
        ({"period": True}, "period=True is not allowed"),
        ({"period": 2.0}, "period=2.0 is not allowed"),
    ],
)
def test_a_wrong_group_is_not_added(group: dict[str, Any], message: str) -> None:
    optimizer = make("momentum")
    before = repr(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [("added", torch.ones(3, requires_grad=True))], **group})
    assert repr(optimizer) == before


def test_hooks_fire() -> None:
    optimizer, called = make("momentum"), []
    optimizer.register_step_pre_hook(lambda *_: called.append("before step"))
    optimizer.register_step_post_hook(lambda *_: called.append("after step"))
    optimizer.register_state_dict_pre_hook(lambda *_: called.append("before save"))
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "note": called.append("after save")})
    optimizer.register_load_state_dict_pre_hook(lambda _, state: called.append("before load") or {**state})
    optimizer.register_load_state_dict_post_hook(lambda _: called.append("after load"))
    feed(optimizer, range(1))
    assert called == ["before step", "after step"]
    saved = optimizer.state_dict()
    assert called[2:] == ["before save", "after save"]
    assert "note" in saved
    optimizer.load_state_dict(saved)
    assert called[4:] == ["before load", "after load"]


def test_grad_scaler() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    param = torch.tensor([3.0], requires_grad=True)
    optimizer = Nested([param], "gd", lr=0.1)
    scaler.scale((param**2).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert param.item() == pytest.approx(3 - 0.1 * 6)
    param.grad = torch.tensor([float("inf")])
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)  # skipped
    assert param.item() == pytest.approx(3 - 0.1 * 6)


# -- clocks of groups --------------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(
    name=st.sampled_from(["gd", "momentum", "adam", "delta_momentum", "cms", "three deep"]),
    period=st.integers(2, 5),
    writes=st.integers(1, 4),
    seed=st.integers(0, 2**16),
)
def test_a_group_with_a_period_steps_once_on_the_sum(name: str, period: int, writes: int, seed: int) -> None:
    slow, once = make(name, torch.float64, seed, period=period), make(name, torch.float64, seed)
    for _ in range(writes):
        total = [torch.zeros_like(param) for param in weights(once)]
        before = [param.detach().clone() for param in weights(slow)]
        for t in range(period):
            assert all(torch.equal(a, b) for a, b in zip(before, weights(slow), strict=True))
            for param, sum_ in zip(weights(slow), total, strict=True):
                param.grad = torch.randn_like(param) + t
                sum_ += param.grad
            slow.step()
        for param, sum_ in zip(weights(once), total, strict=True):
            param.grad = sum_
        once.step()
    for a, b in zip(weights(slow), weights(once), strict=True):
        assert torch.equal(a, b)


def test_a_named_class_takes_a_period_too() -> None:
    param = torch.zeros(1, requires_grad=True)
    optimizer = torch_named.SGD([{"params": [param], "period": 3}], lr=1.0)
    for t in range(6):
        param.grad = torch.full((1,), 10.0**t)
        optimizer.step()
        assert param.item() == [0, 0, -111, -111, -111, -111111][t]


class Decay(Level):
    """Its direction is the parameter itself."""

    def step(self, grad: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        assert signal.param is not None
        return signal.param, state


@pytest.mark.parametrize("count", [1, 2])
def test_a_direction_may_be_the_parameter(count: int) -> None:
    optimizer = Nested([torch.full((2,), 8.0, requires_grad=True) for _ in range(count)], Decay(), 0.25, 1.0)
    feed(optimizer, range(1))
    assert all(torch.equal(param.detach(), torch.full((2,), 8 - 2 - 2.0)) for param in weights(optimizer))


class Counting(Level):
    """Its direction is the number of its step."""

    batched: ClassVar[bool] = True

    def step(self, grad: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        return torch.ones_like(grad) * signal.step, state


def test_a_level_counts_its_own_writes() -> None:
    param = torch.zeros(1, requires_grad=True)
    optimizer = Nested([param], Counting(), lr=1.0, period=2)
    for _ in range(6):
        param.grad = torch.ones(1)
        optimizer.step()
    assert param.item() == -(1 + 2 + 3)


def test_siblings_may_change_places_between_saving_and_loading() -> None:
    """State keys say what a level is, not where it stood: side by side there is no first and second."""
    slow, fast, scaled = levels.momentum(0.99), levels.momentum(0.5), levels.adam()
    saved = Nested([torch.ones(3, requires_grad=True)], parallel(slow, fast, scaled), lr=0.1)
    feed(saved, range(3))
    other = Nested([saved.param_groups[0]["params"][0].detach().clone().requires_grad_()], parallel(scaled, fast, slow))
    other.load_state_dict(saved.state_dict())
    assert list(saved.param_groups[0]["stack"].levels) == ["momentum_beta_0_99", "momentum_beta_0_5", "adam"]
    feed(saved, range(3, 6))
    feed(other, range(3, 6))
    for a, b in zip(saved.param_groups[0]["params"], other.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
