"""Owners of whole tensors: every tensor has one, none has much more to do than others, and costs are those of steps."""

from __future__ import annotations

import itertools
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from nestopt.config.spec import build
from nestopt.core.clock import advance, start
from nestopt.core.level import Level
from nestopt.core.signal import Signal
from nestopt.core.tree import State
from nestopt.optim.sharded.owners import PASSES, imbalance, owners, step_cost
from nestopt.optim.views import Split

costs_of = st.dictionaries(st.text("abcdef", min_size=1, max_size=4), st.integers(1, 1000).map(float), max_size=24)


def most(costs: dict[str, float], found: dict[str, int], world: int) -> float:
    load = [0.0] * world
    for name, rank in found.items():
        load[rank] += costs[name]
    return max(load)


def greedy(costs: dict[str, float], world: int) -> float:
    """Longest first, to whoever has least."""
    load = [0.0] * world
    for cost in sorted(costs.values(), reverse=True):
        load[load.index(min(load))] += cost
    return max(load)


def best(costs: dict[str, float], world: int) -> float:
    return min(
        most(costs, dict(zip(costs, ranks, strict=True)), world)
        for ranks in itertools.product(range(world), repeat=len(costs))
    )


@given(costs_of, st.integers(1, 9))
def test_every_tensor_has_one_owner_and_none_is_worse_off_than_by_greed(costs: dict[str, float], world: int) -> None:
    found = owners(costs, world)
    assert found.keys() == costs.keys()
    assert set(found.values()) <= set(range(world))
    assert most(costs, found, world) <= greedy(costs, world)
    if costs:
        mean = sum(costs.values()) / world
        assert imbalance(costs, found, world) == pytest.approx(most(costs, found, world) / mean)


@given(costs_of, st.integers(1, 9), st.randoms(use_true_random=False))
def test_the_order_of_names_does_not_matter(costs: dict[str, float], world: int, random: Any) -> None:
    names = list(costs)
    random.shuffle(names)
    assert owners({name: costs[name] for name in names}, world) == owners(costs, world)


@given(st.lists(st.integers(1, 50).map(float), min_size=1, max_size=6), st.integers(1, 3))
def test_no_more_than_four_thirds_of_the_best(values: list[float], world: int) -> None:
    costs = {f"w{i}": value for i, value in enumerate(values)}
    assert most(costs, owners(costs, world), world) <= best(costs, world) * (4 / 3 - 1 / (3 * world)) + 1e-9


def test_exchanges_better_what_greed_leaves() -> None:
    costs = dict(zip("abcde", [3.0, 3.0, 2.0, 2.0, 2.0], strict=True))
    assert greedy(costs, 2) == 7
    assert most(costs, owners(costs, 2), 2) == 6


def test_nothing_to_share() -> None:
    assert owners({}, 4) == {}
    assert imbalance({}, {}, 4) == 1.0


LEVELS: dict[str, Any] = {
    "muon": "muon",
    "m3": "m3",
    "shampoo": "shampoo",
    "delta_momentum": "delta_momentum",
    "deep_momentum": "deep_momentum",
}


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("shape", [(24, 40), (32, 16)])
def test_costs_are_those_of_real_steps(name: str, shape: tuple[int, int]) -> None:
    level = build("level", LEVELS[name])
    param, grad = torch.randn(shape), torch.randn(shape)
    state = start(level, param)
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.aten._linalg_eigh: _cubed})
    with torch.no_grad(), counter:
        advance(level, grad, state, Signal(level.period, param, 1.0))
    expected = counter.get_total_flops() + PASSES * param.numel()
    assert counter.get_total_flops() > 0
    assert step_cost(level, torch.Size(shape)) == pytest.approx(expected, rel=0.02)


def _cubed(shape: torch.Size, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 9 * torch.Size(shape).numel() * shape[-1]


def test_parts_of_a_view_cost_each_its_own() -> None:
    muon = build("level", "muon")
    assert step_cost(muon, torch.Size([48, 16]), Split(3)) == 3 * step_cost(muon, torch.Size([16, 16]))
    assert step_cost(muon, torch.Size([8, 4, 3, 3])) == step_cost(muon, torch.Size([8, 36]))  # a convolution


class Looks(Level):
    """Acts by a value, which a tensor without data has not."""

    def step(self, grad: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        return (grad if float(grad.sum()) > 0 else -grad), state


def test_a_level_that_looks_at_values_costs_what_its_shape_says() -> None:
    assert step_cost(Looks(), torch.Size([8, 32])) == 4 * 8 * 32 * 8 + PASSES * 8 * 32
    assert step_cost(Looks(), torch.Size([32])) == 4 * 32 + PASSES * 32
