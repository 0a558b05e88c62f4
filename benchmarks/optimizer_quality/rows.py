"""The optimizers: ours, torch's, and those of other libraries where these are installed.

To add one, name a function of a `Setting` in `ROWS`, with the rate in the middle of its sweep and two options to try.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

import nestopt
from nestopt import Level, Schedule


@dataclasses.dataclass(frozen=True)
class Setting:
    """What an optimizer is made of.

    Attributes:
        rate: the largest, after the warmup.
        decay: the part of a weight that a step at the largest rate takes off.
        rest: rate of Adam on what is no hidden matrix, where the optimizer is for these.
        options: of the optimizer, besides.
    """

    model: nn.Module
    rate: float
    decay: float = 0.0
    rest: float = 3e-3
    options: Mapping[str, float] = dataclasses.field(default_factory=dict)


Option = Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Row:
    """An optimizer.

    Attributes:
        make: the optimizers of a model; all of them are stepped.
        middle: the rate in the middle of the sweep.
        own: two options, `decay` and `rest` among what they may be, that are tried at the best rate.
        falls: its rate falls to 0 after the warmup.
        needs: the package without which there is no such row.
    """

    make: Callable[[Setting], Sequence[Optimizer]]
    middle: float
    own: tuple[Option, Option]
    falls: bool = True
    needs: str = "nestopt"

    @property
    def is_installed(self) -> bool:
        return importlib.util.find_spec(self.needs) is not None


def ours(
    spec: Callable[..., Level],
    middle: float,
    own: tuple[Option, Option],
    *,
    falls: bool = True,
    route: Literal["all"] | None = None,
) -> Row:
    """Return the row of a stack of levels, which is made of its options; with a route of "all", of all parameters."""

    def make(setting: Setting) -> list[Optimizer]:
        rest = {"stack": "adam", "lr": setting.rest, "weight_decay": setting.decay / setting.rest}
        decay = setting.decay / setting.rate
        level = spec(**setting.options)
        return [nestopt.optimizer(setting.model, level, setting.rate, decay, rest, route=route)]

    return Row(make, middle, own, falls)


def theirs(
    package: str, name: str, middle: float, own: tuple[Option, Option], *, falls: bool = True, **given: Any
) -> Row:
    """Return the row of an optimizer for all parameters, imported when it is made."""

    def make(setting: Setting) -> list[Optimizer]:
        options = dict(setting.options)
        if "betas" in given:
            first, second = given["betas"]
            options = {"betas": (options.pop("beta", first), options.pop("beta2", second)), **options}
        options = given | options | {"weight_decay": setting.decay / setting.rate}
        return [getattr(importlib.import_module(package), name)(setting.model.parameters(), lr=setting.rate, **options)]

    return Row(make, middle, own, falls, package)


def _torch_sgd(setting: Setting) -> list[Optimizer]:
    beta = setting.options.get("beta", 0.9)
    decay = setting.decay / setting.rate * (1 - beta)  # which momentum sums up
    return [torch.optim.SGD(setting.model.parameters(), lr=setting.rate, momentum=beta, weight_decay=decay)]


def _torch_muon(setting: Setting) -> list[Optimizer]:
    ours = nestopt.optimizer(setting.model, "muon")  # which says what the hidden matrices are
    matrices, rest = (group["params"] for group in ours.param_groups)
    own = {"lr": setting.rate, "weight_decay": setting.decay / setting.rate}
    other = {"lr": setting.rest, "weight_decay": setting.decay / setting.rest}
    return [
        torch.optim.Muon(matrices, momentum=setting.options.get("beta", 0.95), **own),
        torch.optim.AdamW(rest, **other),
    ]


def _heavyball_soap(setting: Setting) -> list[Optimizer]:
    utils = importlib.import_module("heavyball.utils")
    utils.compile_mode = None  # a compiler's minutes are not what is asked about
    return theirs("heavyball", "SOAP", 0.0, ({}, {}), betas=(0.9, 0.95)).make(setting)


def _adam(beta: float = 0.9, beta2: float = 0.999) -> Level:
    return L.adam((beta, beta2))


def _ademamix(beta2: float = 0.999, alpha: float = 5.0, beta3: float = 0.99) -> Level:
    """AdEMAMix, its slow average grown over 100 steps and as long as these runs have use for."""
    slow = L.average(Schedule({0: 0.9, 100: beta3}, "half_life"), bias_correction=False)
    weights = (1.0, Schedule({0: 0.0, 100: alpha}))
    return L.second_moment(beta2, of=nestopt.parallel(fast=L.average(0.9), slow=slow, weights=weights))


def _lookahead(beta2: float = 0.999, step_size: float = 0.5) -> Level:
    return nestopt.nest(L.gd(), L.adam((0.9, beta2)), of="weights", period=5, step_size=step_size)


L = nestopt.levels
BETA: tuple[Option, Option] = ({"beta": 0.95}, {"beta": 0.8})
ADAM: tuple[Option, Option] = ({"beta": 0.95}, {"beta2": 0.99})
LION: tuple[Option, Option] = ({"beta": 0.95}, {"beta2": 0.95})
MATRICES: tuple[Option, Option] = ({"beta": 0.9}, {"rest": 1e-2})

ROWS: dict[str, Row] = {
    "adamw": ours(_adam, 1e-2, ADAM),
    "muon": ours(L.muon, 0.03, MATRICES),
    "m3": ours(lambda beta=0.95: L.m3((beta, 0.999, 0.9)), 0.03, MATRICES),
    "gd": ours(L.gd, 0.3, ({"decay": 3e-4}, {"decay": 3e-3})),
    "momentum": ours(L.momentum, 0.1, BETA),
    "deep_momentum": ours(L.deep_momentum, 1.0, BETA),
    "dgd": ours(L.dgd, 3.0, ({"delta": 0.1}, {"delta": 0.3}), route="all"),
    # dgd is `of` where there are no inputs, and has its options and its parameters: so they differ in it alone
    "dgd(of=momentum)": ours(lambda beta=0.9: L.dgd(of=L.momentum(beta)), 0.1, BETA, route="all"),
    "dgd(of=adam)": ours(lambda **options: L.dgd(of=_adam(**options)), 1e-2, ADAM, route="all"),
    "dgd(of=muon)": ours(lambda beta=0.95: L.dgd(of=L.muon(beta)), 0.03, MATRICES),
    "soap": ours(lambda basis_every=10: L.soap(basis_every=basis_every), 1e-2, ({"basis_every": 3}, {"rest": 1e-2})),
    "normuon": ours(L.normuon, 1e-2, MATRICES),
    "adamuon": ours(lambda beta=0.95: L.adamuon((beta, 0.95)), 1e-2, MATRICES),
    "shampoo": ours(L.shampoo, 1.0, ({"beta": 0.95}, {"rest": 1e-2})),
    "delta_momentum": ours(L.delta_momentum, 0.3, BETA),
    "ademamix": ours(_ademamix, 3e-3, ({"alpha": 2.0}, {"beta2": 0.99})),
    "lion_chain": ours(lambda beta=0.9, beta2=0.99: L.lion_chain((beta, beta2)), 1e-3, LION),
    "schedule_free": ours(
        lambda beta=0.9, beta2=0.999: L.schedule_free(L.second_moment(beta2), beta), 1e-2, ADAM, falls=False
    ),
    "lookahead(adam)": ours(_lookahead, 1e-2, ({"step_size": 0.8}, {"beta2": 0.99})),
    "torch AdamW": theirs("torch.optim", "AdamW", 1e-2, ADAM, betas=(0.9, 0.999)),
    "torch SGD, momentum": Row(_torch_sgd, 0.1, BETA, needs="torch"),
    "torch Muon": Row(_torch_muon, 0.03, MATRICES, needs="torch"),
    "pytorch-optimizer SOAP": theirs(
        "pytorch_optimizer", "SOAP", 1e-2, ({"beta": 0.9}, {"precondition_frequency": 3}), betas=(0.95, 0.95)
    ),
    "pytorch-optimizer Lion": theirs("pytorch_optimizer", "Lion", 1e-3, LION, betas=(0.9, 0.99)),
    "pytorch-optimizer ScheduleFreeAdamW": theirs(
        "pytorch_optimizer", "ScheduleFreeAdamW", 1e-2, ADAM, betas=(0.9, 0.999), falls=False
    ),
    "HeavyBall SOAP": Row(_heavyball_soap, 1e-2, ({"beta": 0.95}, {"beta2": 0.99}), needs="heavyball"),
}
"""In the order in which they are run."""
