"""Gates: numbers that come from the data."""

import math

import pytest
import torch

from nestopt.core import Gate, Level, Number, bind, chain, gates_of
from nestopt.core.retentions import Decay
from nestopt.levels import adam, momentum, titans


def test_gates_are_found_and_bound_by_path():
    level = chain(a=momentum(Gate(0.9)), b=titans(rule=chain(inner=momentum(Gate(0.3), Gate(0.1)), other=adam())))
    assert set(gates_of(level)) == {
        "levels.a.beta",
        "levels.b.lr",
        "levels.b.retention.keep",
        "levels.b.rule.levels.inner.beta",
        "levels.b.rule.levels.inner.dampening",
    }
    value = torch.tensor(0.25)
    bound = bind(level, {"levels.b.rule.levels.inner.beta": value})
    assert bound.levels["b"].rule.levels["inner"].beta is value
    assert bound.levels["a"].beta == 0.9  # what is not given takes its initial value
    assert isinstance(level.levels["a"].beta, Gate)  # and the level itself is as it was
    assert not gates_of(bound)


class Spread(Level):
    """Has more than its fields, and fields of kinds that are no classes."""

    beta: Number = 0.9
    betas: tuple[float, float] = (0.5, 0.25)
    table: dict[str, float] | None = None

    def __post_init__(self):
        super().__post_init__()
        self.product = math.prod(self.betas)

    def step(self, grad, state, signal):
        return grad * self.beta * self.product, state


def test_what_a_level_made_itself_is_bound_with_it_in_one_graph():
    level = Spread(Gate(0.5))
    x = torch.arange(3.0)

    def scaled(x):
        bound = bind(level, {"beta": x.sum()})
        return bound.step(x, {}, None)[0]

    compiled = torch.compile(scaled, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), x * 3 * 0.125)
    torch.testing.assert_close(scaled(x), x * 3 * 0.125)
    assert level.beta == Gate(0.5)


def test_a_level_without_gates_is_not_copied():
    level = chain(momentum(), adam())
    assert bind(level) is level


@pytest.mark.parametrize(("init", "low", "high"), [(0.9, 0.0, 1.0), (1.5, 0.0, 2.0), (-0.5, -1.0, 3.0)])
def test_the_bias_starts_a_gate_at_its_initial_value(init, low, high):
    gate = Gate(init, low, high)
    assert low + (high - low) / (1 + math.exp(-gate.bias)) == pytest.approx(init)


def test_gates_are_values():
    assert Gate(0.5) == Gate(0.5, 0, 1)
    assert Gate(0.5) != Gate(0.5, 0, 2)
    assert repr(Gate(0.5)) == "Gate(0.5)"
    assert repr(Gate(0.5, 0, 2)) == "Gate(0.5, low=0.0, high=2.0)"
    assert len({Gate(0.5), Gate(0.5), Gate(0.6)}) == 2


@pytest.mark.parametrize("init", [0.0, 1.0, 2.0, math.nan])
def test_a_gate_starts_inside_its_range(init):
    with pytest.raises(ValueError, match="strictly between 0"):
        Gate(init)


def test_decay_is_a_share():
    with pytest.raises(ValueError, match=r"keep=1.5 .* \[0, 1\]"):
        Decay(1.5)
