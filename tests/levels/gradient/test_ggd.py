"""Generalised gradient descent against autograd through its objective, row by row in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestopt.core import Level, Signal, advance, start
from nestopt.core.objectives import L2, Dot, Objective
from nestopt.core.retentions import Decay
from nestopt.levels import dgd, ggd
from nestopt.optim.layer_inputs.watcher import Watcher
from tests.levels.gradient.surprises import F64, direction_of, linear_case, shown, told


class Huber(Objective):
    def __call__(self, y: Tensor, v: Tensor) -> Tensor:
        return F.huber_loss(y, v, reduction="sum", delta=0.3)


class Cubic(Objective):
    def __call__(self, y: Tensor, v: Tensor) -> Tensor:
        return (y - v).abs().pow(3).sum()


VALUES: dict[str, tuple[Any, Callable[[Tensor], Tensor]]] = {
    "surprise": ("surprise", lambda s: -s),
    "sign": ("sign", lambda s: -torch.sign(s)),
    "normalized": ("normalized", lambda s: -s / s.norm()),
    "a function": (torch.tanh, torch.tanh),
}


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("objective", [L2(), Dot(), Huber(), Cubic()], ids=lambda objective: objective.label)
@pytest.mark.parametrize("n", [3, 30])
def test_ggd_descends_its_objective_row_by_row(n: int, objective: Objective, value: str) -> None:
    given_as, by_row = VALUES[value]
    level = ggd(objective, given_as)
    layer, watcher, x, s = linear_case(n, 5, 4, level)
    weight = layer.weight.detach().clone().requires_grad_()
    loss = sum(objective(weight @ row, by_row(error)) for row, error in zip(x, s, strict=True)) / n
    (want,) = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(direction_of(level, layer, watcher, 0.1), want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "conv", [lambda: nn.Conv1d(4, 6, 3, groups=2, padding=1), lambda: nn.Conv2d(2, 3, 2, stride=2)]
)
def test_ggd_on_convolutions(conv: Callable[[], nn.Module]) -> None:
    """Patches are rows: the same as one pass of autograd through the convolution itself."""
    layer, level = conv().double(), ggd(Cubic(), "normalized")
    x = torch.randn(2, layer.in_channels, 6, *[6] * (layer.weight.ndim - 3), dtype=F64)
    target = torch.randn_like(layer(x).detach())
    watcher = shown(layer, level, x, target)
    y = layer(x).detach().requires_grad_()
    (d,) = torch.autograd.grad(F.mse_loss(y, target), y)
    n = y[:, 0].numel()
    v = -d / d.norm(dim=1, keepdim=True)
    weight = layer.weight.detach().clone().requires_grad_()
    out = torch.func.functional_call(layer, {"weight": weight, "bias": torch.zeros_like(layer.bias)}, x)
    (want,) = torch.autograd.grad(Cubic()(out, v) / n, weight)
    torch.testing.assert_close(direction_of(level, layer, watcher, 0.1), want, rtol=1e-10, atol=1e-10)


def test_degenerate_ggd_is_what_is_known() -> None:
    layer, watcher, _, _ = linear_case(8, 5, 4, dgd(mode="paper"))
    inputs, g = told(watcher, layer.weight), layer.weight.grad
    assert g is not None
    signal = Signal(1, layer.weight.detach(), lr=0.2, inputs=inputs)
    assert inputs is not None
    assert inputs.mean_square is not None
    letter = dgd(mode="paper")
    delta, _ = advance(letter, g, start(letter, g), signal)
    torch.testing.assert_close(
        advance(ggd(), g, {}, signal)[0], delta * (1 + 0.2 * inputs.mean_square), rtol=1e-12, atol=0
    )
    assert torch.equal(advance(ggd(Dot()), g, {}, signal)[0], g)
    unseen = Signal(1, layer.weight.detach(), lr=0.2)
    assert torch.equal(advance(ggd(Cubic()), g, {}, unseen)[0], g)


@pytest.mark.parametrize("lr", [0.2, torch.tensor(0.2, dtype=F64)], ids=["number", "tensor"])
def test_ggd_retention(lr: float | Tensor) -> None:
    w, g = torch.randn(4, 5, dtype=F64), torch.randn(4, 5, dtype=F64)
    u, _ = advance(ggd(retention=Decay(0.9)), g, {}, Signal(1, w, lr=lr))
    torch.testing.assert_close(w - lr * u, 0.9 * w - lr * g, rtol=1e-12, atol=1e-12)
    still, _ = advance(ggd(retention=Decay(0.9)), g, {}, Signal(1, w, lr=0 * lr))
    assert torch.equal(still, g)


@pytest.mark.parametrize(
    ("level", "told"),
    [
        (ggd(Cubic(), "sign"), False),
        (ggd(Cubic(), "normalized"), False),
        (ggd(), False),
        (ggd(Cubic()), True),
        (dgd(), False),
    ],
    ids=repr,
)
def test_loss_scaling_changes_nothing(level: Level, told: bool) -> None:
    layer = nn.Linear(5, 4).double()
    x, target = torch.randn(9, 5, dtype=F64), torch.randn(9, 4, dtype=F64)
    want = direction_of(level, layer, shown(layer, level, x, target), 0.1)
    layer.zero_grad()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    watcher = Watcher(layer, {layer.weight: level}, loss_scale=scaler.get_scale if told else None)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    scaler.scale(F.mse_loss(layer(x), target)).backward()
    scaler.unscale_(optimizer)
    torch.testing.assert_close(direction_of(level, layer, watcher, 0.1), want, rtol=1e-9, atol=1e-9)


def test_ggd_with_micro_batches_of_a_divided_loss() -> None:
    layer, level = nn.Linear(5, 4).double(), ggd(Cubic())
    x, target = torch.randn(12, 5, dtype=F64), torch.randn(12, 4, dtype=F64)
    want = direction_of(level, layer, shown(layer, level, x, target), 0.1)
    layer.zero_grad()
    watcher = Watcher(layer, {layer.weight: level}, loss_scale=1 / 3)
    for part, aim in zip(x.split(4), target.split(4), strict=True):
        (F.mse_loss(layer(part), aim) / 3).backward()
    torch.testing.assert_close(direction_of(level, layer, watcher, 0.1), want, rtol=1e-10, atol=1e-10)
