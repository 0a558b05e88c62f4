"""What others put into parameter groups: their types of numbers and lists, tensors, sets, and schedules of momentum."""

from __future__ import annotations

import enum
import io
import logging
from collections.abc import Callable, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import lr_scheduler

import nestopt
from nestopt import levels
from nestopt.core import Level, Signal, State, chain, parallel
from nestopt.core.part import plain
from nestopt.optim import DeltaMomentum, Nested, Shampoo

few = settings(max_examples=25)


class MyFloat(float):
    pass


class MyList(list):
    pass


class MyText(str, enum.Enum):
    ONE = "one"


class WithoutMemory(Level):
    def step(self, grad: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        return grad, state


class Config(Sequence[Any]):
    """A list that is no `list`, as those of configuration libraries."""

    def __init__(self, items: Sequence[Any]) -> None:
        self.items = tuple(items)

    def __getitem__(self, index: Any) -> Any:
        return self.items[index]

    def __len__(self) -> int:
        return len(self.items)


REALS = [np.float64, np.float32, np.float16, Fraction, Decimal, MyFloat, np.array]
WHOLES = [np.int64, np.int8, np.uint16, np.array]
LISTS = [MyList, tuple, Config, np.array]

real = st.sampled_from([0.5, 0.25, 0.125, 0.75])  # exact in each of them


def params(seed: int = 0) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 3, generator=random).requires_grad_() for _ in range(2)]


def run(
    optimizer: torch.optim.Optimizer, steps: int = 4, schedule: Callable[[int], None] | None = None
) -> list[Tensor]:
    made = [param for group in optimizer.param_groups for param in group["params"]]
    for t in range(steps):
        for i, param in enumerate(made):
            param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(10 * t + i))
        optimizer.step()
        if schedule is not None:
            schedule(t)
    return [param.detach().clone() for param in made]


def reloaded(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@few
@given(st.sampled_from(REALS), st.sampled_from(WHOLES), st.sampled_from(LISTS), real, st.integers(1, 4), st.booleans())
def test_numbers_and_lists_of_others_do_as_pythons_and_are_saved_as_these(
    kind: Any, whole: Any, many: Any, number: float, period: int, later: bool
) -> None:
    def made(real: Any, integer: Any, several: Any) -> list[torch.optim.Optimizer]:
        given = {"lr": 1.0 if later else real(number), "weight_decay": real(number)}
        betas = several([number, 0.5])
        found: list[torch.optim.Optimizer] = [
            Nested(params(), levels.momentum(real(number), period=integer(period)), period=integer(period), **given),
            Nested([{"params": params(), **given}], levels.adam(betas)),
            nestopt.optim.AdamW(params(), betas=betas, **given),
        ]
        for optimizer in found:
            if later:  # as a schedule does
                optimizer.param_groups[0]["lr"] = real(number)
        return found

    for theirs, own in zip(made(kind, whole, many), made(float, int, tuple if many is tuple else list), strict=True):
        assert all(map(torch.equal, run(theirs), run(own)))
        saved = reloaded(theirs)
        assert saved["param_groups"] == own.state_dict()["param_groups"]
        own.load_state_dict(saved)


@given(
    st.recursive(
        st.sampled_from(
            [*(kind(0.5) for kind in REALS), *(kind(3) for kind in WHOLES), MyText.ONE, np.bool_(True), None]
        ),
        lambda inner: st.lists(inner, max_size=3).map(MyList) | st.lists(inner, max_size=3).map(Config),
    )
)
def test_plain_values_are_equal_and_of_pythons_types(value: Any) -> None:
    def look(value: Any, made: Any) -> None:
        assert type(made) in (type(None), bool, int, float, str, list, tuple)
        if isinstance(made, list):
            assert len(made) == len(value)
            for a, b in zip(value, made, strict=True):
                look(a, b)
        else:
            assert made == value

    look(value, plain(value))


def test_foreign_values_under_other_keys_are_saved_as_plain() -> None:
    optimizer = Nested([{"params": params(), "note": {"scale": np.float64(0.5), "of": [np.int64(2)]}}], "gd")
    optimizer.param_groups[0]["initial_lr"] = np.float32(0.5)
    group = reloaded(optimizer)["param_groups"][0]
    assert (group["note"], group["initial_lr"]) == ({"scale": 0.5, "of": [2]}, 0.5)


def test_a_set_of_parameters_is_refused() -> None:
    for given_ in (set(params()), frozenset(params())):
        for make in (nestopt.optimizer, Nested, nestopt.optim.AdamW):
            with pytest.raises(TypeError, match="set, which has no order"):
                make(given_)


@few
@given(st.lists(st.lists(real, min_size=4, max_size=4), min_size=2, max_size=3))
def test_groups_that_are_given_one_tensor_as_lr_follow_a_schedule_of_their_own(rates: list[list[float]]) -> None:
    shared = torch.tensor(1.0)
    together = Nested([{"params": params(i)} for i in range(len(rates))], "momentum", shared)
    schedule = lr_scheduler.LambdaLR(together, [lambda t, own=own: own[t % 4] for own in rates])
    alone = [Nested([{"params": params(i)}], "momentum", own[0]) for i, own in enumerate(rates)]
    got = run(together, 4, lambda t: schedule.step())
    for i, (own, optimizer) in enumerate(zip(rates, alone, strict=True)):
        for t in range(4):
            optimizer.param_groups[0]["lr"] = own[t]
            for j, param in enumerate(optimizer.param_groups[0]["params"]):
                param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(10 * t + 2 * i + j))
            optimizer.step()
        for a, b in zip(got[2 * i :], optimizer.param_groups[0]["params"], strict=False):
            torch.testing.assert_close(a, b.detach())


def test_the_tensor_of_one_group_stays_the_callers() -> None:
    lr = torch.tensor(0.5)
    assert Nested(params(), "gd", lr).param_groups[0]["lr"] is lr


# -- schedules of momentum -------------------------------------------------------------------------------------------

STACKS: dict[str, Callable[[float], Level]] = {
    "momentum": levels.momentum,
    "adam": lambda m: levels.adam((m, 0.99)),
    "muon": lambda m: levels.muon(m, dtype="float32"),
    "shampoo": levels.shampoo,
    "within": lambda m: levels.second_moment(of=levels.momentum(m)),
    "the faster of two": lambda m: chain(slow=levels.momentum(0.99), fast=levels.adam((m, 0.999))),
    "the faster by its clock": lambda m: parallel(levels.momentum(0.85, period=4), levels.momentum(m)),
    "both alike": lambda m: parallel(levels.momentum(m), levels.momentum(m, nesterov=True)),
}


@pytest.mark.parametrize("name", STACKS)
@few
@given(st.floats(0.3, 0.95))
def test_a_stack_takes_the_momentum_of_its_group(name: str, momentum: float) -> None:
    cycled, made = Nested(params(), STACKS[name](0.9), 0.1), Nested(params(), STACKS[name](momentum), 0.1)
    cycled.param_groups[0]["momentum"] = momentum
    assert cycled.level(cycled.param_groups[0]) == STACKS[name](momentum)
    assert all(map(torch.equal, run(cycled), run(made)))
    assert cycled.param_groups[0]["stack"] == STACKS[name](0.9)


@pytest.mark.parametrize("scheduler", ["OneCycleLR", "CyclicLR"])
def test_torchs_cycles_at_their_defaults_run_any_stack(scheduler: str, caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    made = [
        *(Nested(params(), stack(0.9), 0.1) for stack in STACKS.values()),
        nestopt.optimizer(model, "muon"),
        DeltaMomentum(params()),
        Shampoo(params()),
    ]
    for optimizer in made:
        schedule: Any = (
            lr_scheduler.OneCycleLR(optimizer, 0.1, 20)
            if scheduler == "OneCycleLR"
            else lr_scheduler.CyclicLR(optimizer, 0.01, 0.1, 4)
        )
        seen = set()
        run(optimizer, 8, lambda t: schedule.step())  # noqa: B023
        optimizer.load_state_dict(reloaded(optimizer))
        for _ in range(3):
            run(optimizer, 1, lambda t: schedule.step())  # noqa: B023
            seen.update(repr(optimizer.level(group)) for group in optimizer.param_groups)
        assert len(seen) == 3 * len(optimizer.param_groups)
    with caplog.at_level(logging.WARNING, "nestopt"):
        optimizer = Nested(params(), WithoutMemory())
        schedule = lr_scheduler.OneCycleLR(optimizer, 0.1, 20)
        run(optimizer, 3, lambda t: schedule.step())
    assert [r.message.partition(":")[0] for r in caplog.records] == ["without_memory has no average of gradients"] * (
        scheduler == "OneCycleLR"  # and it is said once
    )
