"""The kit for authors of levels: every built-in level passes it, and it finds what is wrong with others."""

import types

import numpy as np
import pytest
import torch

import nestopt
from nestopt import Level, chain, nest, parallel
from nestopt.core import hookimpl, registry
from nestopt.core.memories import Window
from nestopt.levels import adam, adamw, attention, forgetting_attention, momentum, muon
from nestopt.optim import Nested
from nestopt.testing import check_level

LEVELS = {
    **{name: registry.get("level", name) for name in registry.names("level")},
    "adamw": lambda: adamw(weight_decay=0.0),  # on tokens there is no parameter to decay
    "attention": lambda: attention(memory=Window(3)),
    "forgetting_attention": lambda: forgetting_attention(memory=Window(3)),
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


class ReturnsNothing(Good):
    def step(self, grad, state, signal):
        return None


class OnlyADirection(Good):
    def step(self, grad, state, signal):
        return grad


class Doubled(Good):
    """Makes float64 of float32, by NumPy."""

    def step(self, grad, state, signal):
        return grad * torch.from_numpy(np.ones(tuple(grad.shape))), state


class WideState(Good):
    def step(self, grad, state, signal):
        return grad, {"m": state["m"] + torch.ones((), dtype=torch.float64).expand_as(grad)}


class Narrow(Good):
    """Does its arithmetic in float32, whatever it is shown."""

    def step(self, grad, state, signal):
        return grad.float(), state


class NewKey(Good):
    def step(self, grad, state, signal):
        return grad, {**state, "more": grad}


class KeepsAList(Good):
    def step(self, grad, state, signal):
        return grad, {"m": [state["m"], grad]}


CONTRACT = [
    (ReturnsNothing, r"step returned None; it must return \(direction, state\)"),
    (OnlyADirection, r"step returned a (Tensor|Parameter); it must return"),
    (Doubled, "direction is torch.float64, not torch.float32"),
    (WideState, "state's 'm' is torch.float64 after a step, not torch.float32"),
    (NewKey, r"changes the state's keys from \['m'\] to \['m', 'more'\]"),
    (KeepsAList, "step's 'm' is list, not a tensor"),
    (NotATensor, "init's 'm' is float, not a tensor"),
    (ChangesGradient, "changes the gradient in place"),
    (InPlace, "changes the state's 'm' in place"),
    (DropsState, "changes the state's keys"),
]


@pytest.mark.parametrize(("cls", "words"), CONTRACT)
@pytest.mark.parametrize("stack", [lambda level: level, lambda level: chain(momentum(), level, adam())])
@pytest.mark.parametrize("options", [{}, {"capturable": True}])
def test_an_optimizer_names_the_plugin_of_a_level_that_breaks_the_contract(cls, words, stack, options):
    module = types.ModuleType("stranger")
    module.nestopt_register_levels = hookimpl(lambda register: register("strange", cls))
    registry.add(module, "stranger_1.0")
    try:
        params = [torch.ones(5, 4, requires_grad=True) for _ in range(2)]
        for param in params:
            param.grad = torch.full((5, 4), 0.5)
        with pytest.raises(ValueError, match=rf"strange \(plugin 'stranger_1.0'\): .*{words}"):
            Nested(params, stack(cls()), **options).step()
        assert all(torch.equal(param, torch.ones(5, 4)) for param in params)
        assert all(torch.equal(param.grad, torch.full((5, 4), 0.5)) for param in params)
    finally:
        registry.remove("stranger_1.0")
    good = Nested(params, stack(Good()), **options)
    good.step()
    assert not torch.equal(params[0], torch.ones(5, 4))


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (ReturnsNothing, "returned None"),
        (OnlyADirection, "returned a Tensor"),
        (Doubled, "direction is torch.float64, not torch.float32.*in torch.float32"),
        (WideState, "'m' is torch.float64 after a step"),
        (Narrow, "direction is torch.float32, not torch.float64"),
        (NewKey, "changes the state's keys"),
        (KeepsAList, "'m' is list, not a tensor"),
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
