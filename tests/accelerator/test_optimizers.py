"""Every level as an optimizer, by the rules of an accelerator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nestopt
from nestopt import levels
from nestopt.models.cost import CostCounter
from nestopt.optim import Nested
from nestopt.optim.execute.choose import executors
from nestopt.optim.execute.stacked import Stacked
from nestopt.optim.execute.update import Slot
from tests.accelerator.held import held

PARTS = {"associative_memory", "chain", "parallel", "nest"}
LIMITED = {"attention", "forgetting_attention", "window_attention"}
"""Their memories grow without a limit by default, which on gradients is refused."""

STACKS: dict[str, Any] = {
    **{name: name for name in nestopt.registry.names("level") if name not in PARTS | LIMITED | {"self_modifying"}},
    "attention of four": {"level": "attention", "memory": {"memory": "window", "size": 4}},
    "clocks": nestopt.parallel(fast=levels.momentum(0.9), slow=levels.muon(period=3), weights=[1.0, 0.5]),
    "nest": nestopt.nest(outer=levels.momentum(0.5, period=4), inner=levels.momentum(0.9)),
    "momentum as torch": levels.momentum(0.9, dampening=0.1, nesterov=False),
    "clipped": nestopt.chain(levels.delta_momentum(), levels.newton_schulz()),
}
NOT_CAPTURED = {"shampoo", "matrix_adagrad", "soap", "dgd", "ggd", "attention of four", "schedule_free"}
NOT_CAPTURED |= {"weight_average"}


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    layers = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
    return nn.Sequential(*layers).to(device="meta", dtype=dtype)


def stepping(net: nn.Module, optimizer: Any, dtype: torch.dtype = torch.float32) -> Callable[[], None]:
    x = torch.empty(5, 6, dtype=dtype, device="meta")

    def run() -> None:
        net(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


@pytest.mark.parametrize("name", STACKS)
def test_a_step(name: str) -> None:
    rest = {"stack": "adamw", "lr": 0.01}
    for dtype, options in (
        (torch.float32, {}),
        (torch.bfloat16, {"weight_decay": 0.1, "rest": rest}),
        (torch.float32, {"metrics": True}),
    ):
        net = model(dtype)
        optimizer = nestopt.optimizer(net, STACKS[name], lr=0.1, **options)
        held(stepping(net, optimizer, dtype))
        held(lambda optimizer=optimizer: optimizer.load_state_dict(optimizer.state_dict()))
        held(optimizer.metrics)
        held(optimizer.explain)


@pytest.mark.parametrize("name", STACKS)
def test_a_capturable_step(name: str) -> None:
    rest = {"stack": "adamw", "lr": 0.01}
    net, lr = model(), torch.full((), 0.1, device="meta")
    if name in NOT_CAPTURED:
        with pytest.raises(ValueError, match=r"capturable=True"):
            nestopt.optimizer(net, STACKS[name], lr=lr, rest=rest, capturable=True)
        return
    optimizer = nestopt.optimizer(net, STACKS[name], lr=lr, rest=rest, capturable=True)
    held(stepping(net, optimizer))
    held(lambda: optimizer.load_state_dict(optimizer.state_dict()))
    assert all(state["step"].device.type == "meta" for state in optimizer.state.values())


@pytest.mark.parametrize("name", ["adam", "adamw", "muon", "momentum"])
def test_a_group_on_a_clock(name: str) -> None:
    net = model()
    matrices = [p for p in net.parameters() if p.ndim == 2]
    for options in ({}, {"capturable": True}):
        held(stepping(net, Nested([{"params": matrices, "period": 2}], name, **options)))


@pytest.mark.parametrize(
    ("make", "most"),
    [
        (lambda p: nestopt.optim.AdamW(p, capturable=True), 2),
        (lambda p: nestopt.optim.Adam(p, capturable=True, amsgrad=True), 2),
        (nestopt.optim.AdamW, 2),
        (lambda p: nestopt.optim.SGD(p, momentum=0.9), 1),
        (lambda p: Nested(p, levels.momentum(0.9), capturable=True), 2),
    ],
)
def test_a_fused_level_steps_all_parameters_in_one_call(make: Callable[[Any], Nested], most: int) -> None:
    params = [nn.Parameter(torch.empty(300, 300, device="meta")) for _ in range(7)]
    optimizer = make(params)
    for _ in range(2):
        for param in params:
            param.grad = torch.empty_like(param)
        with CostCounter("meta") as counter:
            optimizer.step()
    assert counter.cost.ops <= most


def test_matrices_of_the_340m_models_are_stacked() -> None:
    level = levels.muon()
    params = [nn.Parameter(torch.empty(1024, 4224, device="meta")) for _ in range(8)]
    optimizer = Nested(params, level)
    for param in params:
        param.grad = torch.empty_like(param)
    optimizer.step()
    slots = [Slot(param, dict(optimizer.state[param]), level.init(param), None) for param in params]
    kinds = [type(executor) for executor in executors(level, slots)]
    assert kinds == [Stacked, Stacked]


class Peeks(nestopt.Level):
    """Lets a value decide."""

    def step(self, grad: Tensor, state: Any, signal: Any) -> tuple[Tensor, Any]:
        return (grad if grad.sum().item() > 0 else -grad), state


class Grows(nestopt.Level):
    """Keeps every gradient."""

    def init(self, param: Tensor) -> Any:
        return {"all": param.new_zeros(0, *param.shape)}

    def step(self, grad: Tensor, state: Any, signal: Any) -> tuple[Tensor, Any]:
        return grad, {"all": torch.cat([state["all"], grad[None]])}


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize(
    ("level", "words"),
    [
        (Peeks(), "peeks is not allowed with capturable=True, for weight of shape"),
        (Grows(), "grows is not allowed.*changes its shape"),
        (nestopt.chain(levels.momentum(0.9), Peeks()), "peeks is not allowed"),
        (levels.muon(), None),
    ],
)
def test_what_can_not_be_captured_is_refused_by_name(level: Any, words: str | None, device: str) -> None:
    params = [("weight", nn.Parameter(torch.empty(4, 3, device=device)))]
    if words is None:
        Nested(params, level, capturable=True)
        return
    with pytest.raises(ValueError, match=words):
        Nested(params, level, capturable=True)


def test_a_root_that_waits_is_refused_on_an_accelerator_only() -> None:
    stack = nestopt.chain(levels.momentum(0.9), levels.shampoo())
    with pytest.raises(ValueError, match=r"shampoo is not allowed with capturable=True, for w .*eigh"):
        Nested([("w", nn.Parameter(torch.empty(4, 3, device="meta")))], stack, capturable=True)
    Nested([("w", nn.Parameter(torch.empty(4, 3)))], stack, capturable=True)  # for torch.compile


@pytest.mark.parametrize("capturable", [False, True])
def test_counts_are_float32_whatever_the_default_dtype_is(capturable: bool) -> None:
    torch.set_default_dtype(torch.float64)  # put back after each test
    net = model()
    optimizer = nestopt.optim.AdamW(net.parameters(), capturable=capturable)
    held(stepping(net, optimizer))
    assert {state["step"].dtype for state in optimizer.state.values()} == {torch.float32}
