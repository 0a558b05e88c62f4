"""The levels on gradients in every role of a level: the contract, in a model, in YAML, described."""

from __future__ import annotations

import pytest
import torch
import yaml
from torch import nn

import nestopt
from nestopt.core import Level, Signal, chain, start
from nestopt.core.clock import advance_
from nestopt.core.tree import leaves, tree_map
from nestopt.levels import (
    cautious,
    clip,
    delta_momentum,
    feature_momentum,
    m3,
    mars,
    matrix_adagrad,
    momentum,
    normuon,
    preconditioned_momentum,
    regression_optimum,
    second_moment,
    shampoo,
    soap,
)
from nestopt.testing import check_level

RATES: list[tuple[Level, float]] = [
    (second_moment(), 0.01),
    (second_moment(of=momentum(0.9, 0.9), mode="sum"), 0.03),
    (second_moment(of=momentum(period=2)), 0.001),
    (preconditioned_momentum(), 0.003),
    (preconditioned_momentum(P=shampoo(beta=0.0)), 0.03),
    (preconditioned_momentum(P=second_moment(period=2)), 0.0003),
    (feature_momentum(0.5, P=second_moment()), 0.003),
    (delta_momentum(P=second_moment()), 0.003),
    (regression_optimum(), 0.01),
    (regression_optimum(target=0.3), 0.003),
    (matrix_adagrad(side="right"), 0.03),
    (shampoo(), 0.03),
    (shampoo(beta=0.0, mode="ema", root_every=2), 0.03),
    (shampoo(max_size=6), 0.03),
    (second_moment(over="rows"), 0.01),
    (second_moment(over="factored"), 0.01),
    (soap(), 0.03),
    (soap(momentum(period=2), basis_every=2), 0.1),
    (normuon(), 0.03),
    (cautious(of=momentum(0.9)), 0.1),
    (chain(mars(), clip(by="rms")), 0.01),
    (m3(slow_period=2), 0.03),
    (m3(slow_period=2, mode="paper", eps=1.0), 0.03),  # its first steps are as long as ε allows
]
LEVELS = [level for level, _ in RATES]


@pytest.mark.parametrize("level", LEVELS, ids=str)
def test_it_keeps_the_contract_of_levels(level: Level) -> None:
    check_level(level)


@pytest.mark.parametrize(("level", "lr"), RATES, ids=map(str, LEVELS))
def test_it_trains_a_small_model(level: Level, lr: float) -> None:
    model = nn.Sequential(nn.Conv1d(2, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 5), nn.ReLU(), nn.Linear(5, 1))
    x = torch.randn(64, 2, 8)
    y = x.mean((1, 2)).unsqueeze(1)
    optimizer, losses = nestopt.optimizer(model, level, lr=lr, rest={"stack": "adamw", "lr": 0.01}), []
    for _ in range(40):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("level", LEVELS, ids=str)
def test_in_yaml_it_is_the_same_level(level: Level, tmp_path) -> None:
    file = tmp_path / "stack.yaml"
    file.write_text(yaml.safe_dump(nestopt.to_spec(level)))
    assert nestopt.load(file) == level


def test_nested_levels_are_keys_of_configs() -> None:
    spec = {"level": "preconditioned_momentum", "P": {"level": "second_moment", "of": "momentum", "period": 4}}
    assert nestopt.build("level", spec) == preconditioned_momentum(P=second_moment(of=momentum(), period=4))
    spec = {"level": "feature_momentum", "features": {"features": "signed_power", "exponent": 0.25}}
    assert nestopt.build("level", spec).features.exponent == 0.25
    with pytest.raises(nestopt.ConfigError, match=r"P\.beta2: 2\.0 is not allowed"):
        nestopt.build("level", {"level": "delta_momentum", "P": {"level": "second_moment", "beta2": 2}})


@pytest.mark.parametrize("level", LEVELS, ids=str)
def test_every_byte_of_the_state_belongs_to_one_memory(level: Level) -> None:
    found = nestopt.describe(level, shape=(6, 4))
    state = leaves(start(level, torch.zeros(6, 4)))
    assert found.state == sum(leaf.numel() * leaf.element_size() for _, leaf in state)


def _names(level: Level) -> list[list[str]]:
    return [[memory.name for memory in found] for found in nestopt.describe(level).levels]


def test_described_in_the_order_of_levels() -> None:
    assert _names(second_moment(of=momentum())) == [["second_moment.of", "second_moment.exp_avg_sq"]]
    assert _names(preconditioned_momentum()) == [["preconditioned_momentum.momentum"], ["preconditioned_momentum.P"]]
    assert _names(delta_momentum()) == [["delta_momentum"]]
    assert _names(m3(slow_period=16)) == [["m3.slow"], ["m3.momentum", "m3.rms"]]
    assert _names(shampoo()) == [["shampoo.momentum", "shampoo.left", "shampoo.right"]]


TOGETHER = [level for level in LEVELS if level.is_batched]


@pytest.mark.parametrize("level", TOGETHER, ids=str)
def test_a_stack_of_matrices_steps_in_place_as_each_alone(level: Level) -> None:
    grads = [torch.randn(3, 5, 4, dtype=torch.float64) for _ in range(5)]
    single = [start(level, grads[0][i]) for i in range(3)]
    stacked = tree_map(lambda *each: torch.stack(each), *single)
    for t, grad in enumerate(grads, start=1):
        got = advance_(level, grad, stacked, Signal(t, torch.zeros_like(grad)))
        for i in range(3):
            want = advance_(level, grad[i], single[i], Signal(t, torch.zeros_like(grad[i])))
            torch.testing.assert_close(got[i], want, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("level", LEVELS, ids=str)
def test_as_a_layer_it_has_finite_gradients(level: Level) -> None:
    layer = nestopt.layer(level, dim=6, heads=2)
    x = torch.randn(2, 5, 6, requires_grad=True)
    y, _ = layer(x)
    (slope,) = torch.autograd.grad(y.square().sum(), x)
    assert slope.isfinite().all()
    assert slope.any()
