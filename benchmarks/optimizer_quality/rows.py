"""The optimizers: ours, torch's, and those of other libraries where these are installed.

To add one, name a function of a model and a rate in `ROWS`, with the rate in the middle of its sweep.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import nestopt

REST = 3e-3
"""The rate of AdamW on what is no hidden matrix, in all rows that are for these."""


@dataclasses.dataclass(frozen=True)
class Row:
    """An optimizer.

    Attributes:
        make: the optimizers of a model, at a rate; all of them are stepped.
        middle: the rate in the middle of the sweep.
        needs: the package without which there is no such row.
    """

    make: Callable[[nn.Module, float], Sequence[Optimizer]]
    middle: float
    needs: str = "nestopt"

    @property
    def is_installed(self) -> bool:
        return importlib.util.find_spec(self.needs) is not None


def ours(spec: Any, middle: float) -> Row:
    """Return the row of a stack of levels."""
    return Row(
        lambda model, rate: [nestopt.optimizer(model, spec(), lr=rate, rest={"stack": "adamw", "lr": REST})], middle
    )


def theirs(make: Callable[..., Optimizer], middle: float, needs: str = "torch", **options: Any) -> Row:
    """Return the row of an optimizer for all parameters."""
    return Row(lambda model, rate: [make(model.parameters(), lr=rate, **options)], middle, needs)


def _torch_muon(model: nn.Module, rate: float) -> list[Optimizer]:
    ours = nestopt.optimizer(model, "muon")  # which says what the hidden matrices are
    matrices, rest = (group["params"] for group in ours.param_groups)
    return [torch.optim.Muon(matrices, lr=rate, weight_decay=0.0), torch.optim.AdamW(rest, lr=REST, weight_decay=0.0)]


def _of(package: str, name: str) -> Callable[..., Optimizer]:
    """Return an optimizer of a package, imported when it is made."""

    def make(params: Any, **options: Any) -> Optimizer:
        return getattr(importlib.import_module(package), name)(params, **options)

    return make


L = nestopt.levels

ROWS: dict[str, Row] = {
    "gd": ours(L.gd, 1.0),
    "momentum": ours(L.momentum, 0.1),
    "adam": ours(L.adam, 3e-3),
    "muon": ours(L.muon, 0.03),
    "m3": ours(L.m3, 0.03),
    "deep_momentum": ours(L.deep_momentum, 1.0),
    "delta_momentum": ours(L.delta_momentum, 0.03),
    "dgd": ours(L.dgd, 3.0),
    "dgd(of=momentum)": ours(lambda: L.dgd(of=L.momentum()), 0.3),
    "dgd(of=adam)": ours(lambda: L.dgd(of=L.adam()), 1e-2),
    "dgd(of=muon)": ours(lambda: L.dgd(of=L.muon()), 0.03),
    "second_moment(of=muon)": ours(lambda: L.second_moment(of=L.muon()), 0.03),
    "torch SGD": theirs(torch.optim.SGD, 1.0),
    "torch SGD, momentum": theirs(torch.optim.SGD, 0.1, momentum=0.9),
    "torch AdamW": theirs(torch.optim.AdamW, 3e-3, weight_decay=0.0),
    "torch Muon": Row(_torch_muon, 0.03),
    "pytorch-optimizer Lion": theirs(_of("pytorch_optimizer", "Lion"), 3e-4, "pytorch_optimizer"),
    "pytorch-optimizer SOAP": theirs(_of("pytorch_optimizer", "SOAP"), 3e-3, "pytorch_optimizer"),
    "HeavyBall SOAP": theirs(_of("heavyball", "SOAP"), 3e-3, "heavyball"),
}
