"""What tests of watched layers share: the rows of a layer in plain loops, and their means by definition."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestopt.core.inputs import LayerInputs
from nestopt.core.level import Level
from nestopt.core.objectives import Objective
from nestopt.levels.gradient.dgd import Dgd
from nestopt.optim.layer_inputs.sums import means
from nestopt.optim.layer_inputs.watcher import Watcher

Letter = partial(Dgd, mode="paper")
"""A level that asks for all there is to know of inputs, but for their Gram matrix."""


def watch(model: nn.Module, level: Level | None = None, **kwargs: Any) -> Watcher:
    return Watcher(model, dict.fromkeys(model.parameters(), level or Letter()), **kwargs)


def told(watcher: Watcher, param: Tensor) -> LayerInputs | None:
    """What a level is told with the present gradient, which is then cleared."""
    inputs = means(watcher.totals(param), param)
    param.grad = None
    return inputs


def taken(watcher: Watcher, param: Tensor) -> LayerInputs:
    inputs = told(watcher, param)
    assert inputs is not None
    return inputs


def patches(layer: nn.Module, x: Tensor) -> Tensor:
    """The rows `[groups, n, in]` that a layer's weight meets in x, cut out one by one."""
    if isinstance(layer, nn.Linear):
        return x.reshape(1, -1, x.shape[-1])
    dims = layer.weight.ndim - 2
    if x.ndim == dims + 1:
        x = x[None]
    kernel = layer.weight.shape[2:]
    if layer.padding == "same":
        totals = [d * (k - 1) for d, k in zip(layer.dilation, kernel, strict=True)]
        sides = [(total // 2, total - total // 2) for total in totals]
    else:
        sides = [(0, 0) if layer.padding == "valid" else (p, p) for p in layer.padding][:dims]
    pad = [size for side in reversed(sides) for size in side]
    x = F.pad(x, pad, mode="constant" if layer.padding_mode == "zeros" else layer.padding_mode)
    reach = [d * (k - 1) + 1 for d, k in zip(layer.dilation, kernel, strict=True)]
    starts = [range(0, size - r + 1, s) for size, r, s in zip(x.shape[2:], reach, layer.stride, strict=True)]
    width, rows = x.shape[1] // layer.groups, []
    for group in range(layer.groups):
        part = x[:, group * width : (group + 1) * width]
        for image, corner in itertools.product(part, itertools.product(*starts)):
            at = tuple(slice(c, c + r, d) for c, r, d in zip(corner, reach, layer.dilation, strict=True))
            rows.append(image[(slice(None), *at)].reshape(-1))
    return torch.stack(rows).reshape(layer.groups, -1, rows[0].numel())


def expected(weight: Tensor, rows: Tensor, normalize: bool = False) -> dict[str, Tensor]:
    """The means over rows `[groups, n, in]` from their definition."""
    groups, n, width = rows.shape
    if normalize:
        rows = torch.nan_to_num(rows / rows.norm(dim=-1, keepdim=True))
    gram = rows.mT @ rows / n
    decay = weight.detach().reshape(groups, -1, width) @ gram
    energy = rows.square().sum(-1).mean(-1)
    ones = (1,) * (weight.ndim - 1)
    each = energy.repeat_interleave(len(weight) // groups).reshape(-1, *ones) if groups > 1 else energy[0]
    return {"wxx": decay.reshape(weight.shape), "mean_square": each, "gram": gram if groups > 1 else gram[0]}


def agrees(got: LayerInputs, want: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    for key in ("wxx", "mean_square"):
        torch.testing.assert_close(getattr(got, key), want[key], rtol=tolerance, atol=tolerance)
    if got.rows is not None:
        torch.testing.assert_close(got.rows.mT @ got.rows, want["gram"], rtol=tolerance, atol=tolerance)
    if got.gram is not None:
        torch.testing.assert_close(got.gram, want["gram"], rtol=tolerance, atol=tolerance)


class Block(nn.Module):
    """Two layers with an activation that works in place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.relu, self.down = nn.Linear(width, 6), nn.ReLU(inplace=True), nn.Linear(6, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.relu(self.up(x)))


class Cubic(Objective):
    """Not linear in the value."""

    def __call__(self, y: Tensor, v: Tensor) -> Tensor:
        return (y - v).abs().pow(3).sum()
