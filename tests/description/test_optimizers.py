"""Optimizers: torch's own before and after a step, those that run levels, and anyone's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nestopt.core.compose import chain
from nestopt.description import Description, describe
from nestopt.levels import adam, gd, momentum, muon
from nestopt.optim import SGD as OurSGD
from nestopt.optim import Adam as OurAdam
from nestopt.optim import Nested


def params() -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(5, 2))]


def step(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.randn_like(param)
    optimizer.step()


def sizes(found: Description) -> dict[str, tuple[int | None, int | None]]:
    return {memory.name: (memory.parameters, memory.state) for memory in found.memories}


TORCH = [
    (torch.optim.SGD, {}, [["weights"]]),
    (torch.optim.SGD, {"momentum": 0.9}, [["weights"], ["sgd"]]),
    (torch.optim.Adam, {}, [["weights"], ["adam.exp_avg", "adam.exp_avg_sq"]]),
    (
        torch.optim.AdamW,
        {"amsgrad": True},
        [["weights"], ["adamw.max_exp_avg_sq"], ["adamw.exp_avg", "adamw.exp_avg_sq"]],
    ),
    (torch.optim.NAdam, {}, [["weights"], ["nadam.exp_avg", "nadam.exp_avg_sq"]]),
    (torch.optim.RAdam, {}, [["weights"], ["radam.exp_avg", "radam.exp_avg_sq"]]),
    (torch.optim.Adamax, {}, [["weights"], ["adamax.exp_avg", "adamax.exp_inf"]]),
    (torch.optim.RMSprop, {}, [["weights"], ["rmsprop"]]),
    (
        torch.optim.RMSprop,
        {"momentum": 0.9, "centered": True},
        [["weights"], ["rmsprop.momentum_buffer"], ["rmsprop.square_avg", "rmsprop.grad_avg"]],
    ),
    (torch.optim.Adagrad, {}, [["weights"], ["adagrad"]]),
    (torch.optim.Adadelta, {}, [["weights"], ["adadelta.acc_delta"], ["adadelta.square_avg"]]),
    (torch.optim.Rprop, {}, [["weights"], ["rprop.step_size"], ["rprop.prev"]]),
    (torch.optim.Muon, {}, [["weights"], ["muon"]]),
]


@pytest.mark.parametrize(("cls", "settings", "expected"), TORCH, ids=lambda value: getattr(value, "__name__", ""))
def test_torchs_own_are_known_before_they_step(cls: Any, settings: dict[str, Any], expected: list[list[str]]) -> None:
    optimizer = cls(params(), **settings)
    before = describe(optimizer)
    assert [sorted(m.name for m in level) for level in before.levels] == [sorted(level) for level in expected]
    assert all(memory.objective for memory in before.memories if memory.name != "rprop.step_size")
    assert set(sizes(before).values()) == {(22, 88)}
    step(optimizer)
    after = describe(optimizer)
    assert [[m.name for m in level] for level in after.levels] == [[m.name for m in level] for level in before.levels]
    assert sizes(after) == sizes(before)
    assert not before.notes


def test_state_is_measured_as_it_is() -> None:
    optimizer = torch.optim.Adafactor(params())
    assert {numbers for name, (numbers, _) in sizes(describe(optimizer)).items() if name != "weights"} == {None}
    step(optimizer)
    assert sizes(describe(optimizer)) == {
        "weights": (22, 88),
        "adafactor.row_var": (9, 36),
        "adafactor.col_var": (5, 20),
    }


def test_groups_that_differ_in_numbers_only_are_one() -> None:
    first, second = params()
    optimizer = torch.optim.AdamW([{"params": [first], "weight_decay": 0.0}, {"params": [second]}])
    assert sizes(describe(optimizer)) == {
        "weights": (22, 88),
        "adamw.exp_avg": (22, 88),
        "adamw.exp_avg_sq": (22, 88),
    }


def test_groups_that_keep_different_memories_are_apart() -> None:
    first, second = params()
    optimizer = torch.optim.SGD([{"params": [first], "momentum": 0.9}, {"params": [second]}])
    found = describe(optimizer)
    assert {m.name: (m.parameters, m.needs) for m in found.memories} == {
        "weights (sgd)": (12, ("sgd",)),
        "weights (sgd_2)": (10, ()),
        "sgd": (12, ()),
    }


def test_describing_changes_nothing() -> None:
    weights = params()
    optimizer = torch.optim.Adam(weights)
    kept, random = [weight.clone() for weight in weights], torch.get_rng_state()
    describe(optimizer)
    assert not optimizer.state
    assert all(torch.equal(a, b) for a, b in zip(kept, weights, strict=True))
    assert torch.equal(random, torch.get_rng_state())


class Lion(torch.optim.Optimizer):
    def __init__(self, params: Any, lr: float = 1e-4) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                state = self.state[param]
                state.setdefault("exp_avg", torch.zeros_like(param)).lerp_(param.grad, 0.1)


class Demanding(Lion):
    def __init__(self, params: Any, model: nn.Module) -> None:
        super().__init__(params)
        self.defaults["model"] = model.weight.shape


def test_anyones_optimizer_is_described_by_what_it_keeps() -> None:
    found = describe(Lion(params()))
    assert sizes(found) == {"weights": (22, 88), "lion": (22, 88)}
    assert found.memories[1].objective == ""
    assert "Lion is described by the tensors it keeps" in found.notes[0]
    assert found.notes[0] in " ".join(str(found).split())


def test_an_optimizer_that_shows_nothing_yet_is_said_to() -> None:
    optimizer = Demanding(params(), nn.Linear(1, 1))
    found = describe(optimizer)
    assert sizes(found) == {"weights": (22, 88)}
    assert "only once it has taken a step" in found.notes[0]
    step(optimizer)
    assert sizes(describe(optimizer)) == {"weights": (22, 88), "demanding": (22, 88)}


# -- optimizers that run levels ----------------------------------------------------------------------------------------


def test_stacks_of_groups_on_their_own_clocks() -> None:
    matrix, bias = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(4, dtype=torch.bfloat16))
    optimizer = Nested(
        [{"params": [matrix], "stack": chain(momentum(), muon())}, {"params": [bias], "stack": adam(), "period": 16}]
    )
    found = describe(optimizer)
    assert [[(m.name, m.frequency) for m in level] for level in found.levels] == [
        [("weights (adam_every_16)", "every 16 steps")],
        [("adam_every_16.exp_avg", "every 16 steps"), ("adam_every_16.exp_avg_sq", "every 16 steps")],
        [("weights (chain)", "every step")],
        [("chain.muon", "every step")],
        [("chain.momentum", "every step")],
    ]
    before = sizes(found)
    assert before["weights (adam_every_16)"] == (4, 8)
    # float32 although the weights are not; and the sum that the group accumulates
    assert before["adam_every_16.exp_avg"] == (4, 16 + 16)
    assert found.memories[3].rule == "momentum → muon"
    step(optimizer)
    assert sizes(describe(optimizer)) == before
    kept = (value for state in optimizer.state.values() for key, value in state.items() if key != "step")
    assert found.state == sum(value.numel() * value.element_size() for value in kept)


def test_convolutions_are_measured_as_the_matrices_they_are_run_as() -> None:
    kernel = nn.Parameter(torch.randn(6, 2, 3, 3))
    optimizer = Nested([kernel], "muon")
    assert describe(optimizer).state == 4 * kernel.numel()


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (OurAdam, torch.optim.Adam),
        (lambda p: OurSGD(p, momentum=0.9), lambda p: torch.optim.SGD(p, momentum=0.9)),
        (OurSGD, torch.optim.SGD),
    ],
)
def test_named_optimizers_have_the_levels_of_torchs(ours: Any, theirs: Any) -> None:
    mine, other = describe(ours(params())), describe(theirs(params()))
    assert [[m.frequency for m in level] for level in mine.levels] == [
        [m.frequency for m in level] for level in other.levels
    ]
    assert (mine.state, mine.weights) == (other.state, other.weights)


def test_plain_descent_remembers_nothing_but_what_its_clock_sums() -> None:
    weight: list[Tensor] = [nn.Parameter(torch.zeros(3, 2))]
    assert sizes(describe(Nested(weight, gd()))) == {"weights": (6, 24)}
    assert describe(Nested(weight, gd(), period=4)).state == 24
