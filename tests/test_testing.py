"""The kit for authors of levels: every built-in level passes it, and it finds what is wrong with others."""

import pytest
import torch

import nestopt
from nestopt import Level, chain, nest, parallel
from nestopt.core import registry
from nestopt.core.memories import Window
from nestopt.levels import adam, adamw, attention, momentum, muon
from nestopt.testing import check_level

LEVELS = {
    **{name: registry.get("level", name) for name in registry.names("level")},
    "adamw": lambda: adamw(weight_decay=0.0),  # on tokens there is no parameter to decay
    "attention": lambda: attention(memory=Window(3)),
    "chain": lambda: chain(momentum(), adam(period=2)),
    "nest": lambda: nest(momentum(0.5, period=2), chain(momentum(), adam())),
    "parallel": lambda: parallel(momentum(), muon(period=3), weights=[1, 0.1]),
}


@pytest.mark.parametrize("name", LEVELS)
def test_every_level_keeps_the_contract(name):
    check_level(LEVELS[name]())


class Good(Level):
    beta: float = 0.9

    def init(self, param):
        return {"m": torch.zeros_like(param)}

    def step(self, grad, state, signal):
        m = self.beta * state["m"] + grad
        return m, {"m": m}


class InPlace(Good):
    def step(self, grad, state, signal):
        state["m"].mul_(self.beta).add_(grad)
        return state["m"], state


class ChangesGradient(Good):
    def step(self, grad, state, signal):
        grad.mul_(2)
        return grad, state


class KeepsOnSelf(Good):
    def step(self, grad, state, signal):
        self.beta += 1
        return self.beta * grad, state


class OtherShape(Good):
    def step(self, grad, state, signal):
        return grad.flatten(), state


class DropsState(Good):
    def step(self, grad, state, signal):
        return grad, {}


class DividesByZero(Good):
    def step(self, grad, state, signal):
        return grad / grad.norm(), state


class FalselyBatched(Good):
    batched = True

    def step(self, grad, state, signal):
        return grad / (1 + grad.norm()), state


class NotATensor(Good):
    def init(self, param):
        return {"m": 0.0}


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (InPlace, "state's 'm' in place"),
        (ChangesGradient, "changes the gradient in place"),
        (KeepsOnSelf, "keep all state in `state`"),
        (OtherShape, r"direction is \[15\], not \[5, 3\]"),
        (DropsState, "changes the state's keys"),
        (DividesByZero, "not finite"),
        (FalselyBatched, "a stack of tensors gives other directions"),
        (NotATensor, "'m' is float, not a tensor"),
    ],
)
def test_what_is_wrong_is_found(cls, words):
    check_level(Good())
    with pytest.raises(AssertionError, match=words):
        check_level(cls())


def test_the_public_names_are_there():
    for name in nestopt.__all__:
        assert hasattr(nestopt, name), name
