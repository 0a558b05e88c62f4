"""What tests of levels on layers share: a layer after one backward pass, watched."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestopt.core import Level, Signal, advance, start
from nestopt.core.inputs import LayerInputs
from nestopt.core.tree import State
from nestopt.optim.layer_inputs.sums import means
from nestopt.optim.layer_inputs.watcher import Watcher

F64 = torch.float64


def shown(model: nn.Module, level: Level, x: Tensor, target: Tensor, scale: float = 1.0, **kwargs: Any) -> Watcher:
    """Run one mean loss forward and backward, watched."""
    watcher = Watcher(model, dict.fromkeys(model.parameters(), level), **kwargs)
    (scale * F.mse_loss(model(x), target)).backward()
    return watcher


def told(watcher: Watcher, param: Tensor) -> LayerInputs | None:
    """What a level is told of a parameter."""
    return means(watcher.totals(param), param)


def direction_of(level: Level, layer: nn.Module, watcher: Watcher, lr: float, state: State | None = None) -> Tensor:
    """The direction for the layer's weight."""
    weight: Tensor = layer.weight
    assert weight.grad is not None
    state = start(level, weight) if state is None else state
    return advance(level, weight.grad, state, Signal(1, weight.detach(), lr=lr, inputs=told(watcher, weight)))[0]


def linear_case(n: int, into: int, out: int, level: Level) -> tuple[nn.Linear, Watcher, Tensor, Tensor]:
    """A watched linear layer after one backward pass, its inputs X and its local surprises S = n dL/dY."""
    layer = nn.Linear(into, out).double()
    x, target = torch.randn(n, into, dtype=F64), torch.randn(n, out, dtype=F64)
    watcher = shown(layer, level, x, target)
    y = layer(x).detach().requires_grad_()
    (d,) = torch.autograd.grad(F.mse_loss(y, target), y)
    return layer, watcher, x, n * d
