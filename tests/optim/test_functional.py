"""A step as a pure function: the same as the optimizer's, and differentiable."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from nestopt.core import Level, chain, nest, parallel
from nestopt.levels import adam, adamw, delta_momentum, gd, m3, momentum, muon, newton_schulz
from nestopt.optim import Nested, functional_step

LEVELS: list[Level] = [
    gd(),
    momentum(0.9, nesterov=True),
    adamw(weight_decay=0.1),
    delta_momentum(),
    muon(dtype="float64"),
    m3(slow_period=2, dtype="float64"),
    chain(momentum(0.9, period=2), adam()),
    parallel(momentum(0.9), newton_schulz(dtype="float64"), weights=[0.5, 2.0]),
    nest(gd(period=2), momentum(0.5)),
]


def quadratic(params: dict[str, Tensor]) -> Tensor:
    curve = torch.arange(1, 13, dtype=torch.float64).reshape(4, 3)
    return (curve * (params["w"] - 0.3).square()).sum()


def descend(level: Level, start: Tensor, lr: float | Tensor, steps: int = 4, decay: float | Tensor = 0.1) -> Tensor:
    """Where `steps` steps from `start` arrive: a function of all that it is given."""
    params, state = {"w": start}, None
    for _ in range(steps):
        (grad,) = torch.autograd.grad(quadratic(params), [params["w"]], create_graph=True)
        params, state = functional_step(level, params, {"w": grad}, state, lr=lr, weight_decay=decay)
    return params["w"]


def start() -> Tensor:
    return torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3).requires_grad_()


@pytest.mark.parametrize("level", LEVELS, ids=repr)
def test_it_is_the_optimizer(level: Level) -> None:
    param = start()
    optimizer = Nested([param], level, lr=0.01, weight_decay=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        quadratic({"w": param}).backward()
        optimizer.step()
    torch.testing.assert_close(descend(level, start(), 0.01), param, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("level", LEVELS, ids=repr)
def test_gradients_by_start_rate_and_decay(level: Level) -> None:
    lr, decay = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (0.01, 0.1))
    assert gradcheck(lambda w, r, d: descend(level, w, r, 3, d), (start(), lr, decay))


@pytest.mark.parametrize(
    "made",
    [momentum, lambda beta: momentum(0.9, dampening=beta), delta_momentum, muon],
    ids=["momentum", "dampening", "delta_momentum", "muon"],
)
def test_gradients_by_the_numbers_of_a_level(made: Callable[[Tensor], Level]) -> None:
    beta = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda b: descend(made(b), start(), 0.01), (beta,))


def test_nothing_is_changed_in_place() -> None:
    w, grad = start().detach(), torch.ones(4, 3, dtype=torch.float64)
    params, state = functional_step(adam(), {"w": w}, {"w": grad}, lr=0.1)
    kept = {key: value.clone() for key, value in state["levels"]["w"].items()}
    functional_step(adam(), params, {"w": grad}, state, lr=0.1)
    assert torch.equal(w, start())
    assert torch.equal(grad, torch.ones_like(grad))
    assert state["step"] == 1
    assert all(torch.equal(value, kept[key]) for key, value in state["levels"]["w"].items())


def test_a_parameter_without_a_gradient_stays() -> None:
    params = {"a": torch.ones(2), "b": torch.ones(3)}
    new, state = functional_step("adam", params, {"a": torch.ones(2)})
    assert torch.equal(new["b"], params["b"])
    assert not torch.equal(new["a"], params["a"])
    assert list(state["levels"]) == ["a"]


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(KeyError, match=r"c.*params has"):
        functional_step("gd", {"a": torch.ones(2)}, {"c": torch.ones(2)})


def test_a_learned_rate_learns() -> None:
    """Meta-learning: descending the loss after five steps by the learning rate finds a better one."""
    log_lr = torch.tensor(-7.0, dtype=torch.float64, requires_grad=True)
    outer = torch.optim.Adam([log_lr], lr=0.1)
    losses = []
    for _ in range(40):
        loss = quadratic({"w": descend(momentum(0.5), start(), log_lr.exp(), 5, 0.0)})
        outer.zero_grad()
        loss.backward()
        outer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
