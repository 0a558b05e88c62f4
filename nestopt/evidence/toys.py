"""Small functions of two weights on which optimizers are told apart by the steps that they need."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nestopt.config import build
from nestopt.core.level import Level
from nestopt.evidence.trials import Plan
from nestopt.optim import Nested

NEAR = 1e-3
"""How much of the first value is left of a function where it counts as minimised."""

RATES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""Of which each optimizer has, on each function, the one that needs the fewest steps over all starts."""

Function = Callable[[Tensor, int], Tensor]


def _valley(w: Tensor, t: int) -> Tensor:
    """A curved valley, least at (1, 1)."""
    return 0.1 * (1 - w[0]) ** 2 + 0.3 * (w[1] - w[0] ** 2) ** 2


def _times_100(w: Tensor, t: int) -> Tensor:
    """A bowl a hundred times as steep one way as the other."""
    return 0.005 * w[0] ** 2 + 0.5 * w[1] ** 2


def _oscillating(w: Tensor, t: int) -> Tensor:
    """A flat bowl, across which the gradient changes its sign at every step."""
    return 0.02 * w[0] ** 2 + 0.1 * w[1] ** 2 + (0.2 if t % 2 else -0.2) * w[1] * (t >= 0)


def _turning(w: Tensor, t: int) -> Tensor:
    """A valley that turns about its lowest point, a tenth of a radian a step."""
    c, s = math.cos(0.1 * max(t, 0)), math.sin(0.1 * max(t, 0))
    return 0.01 * (c * w[0] + s * w[1]) ** 2 + 0.5 * (c * w[1] - s * w[0]) ** 2


TOYS: Mapping[str, Function] = {
    "valley": _valley,
    "times 100": _times_100,
    "oscillating": _oscillating,
    "turning": _turning,
}
"""The functions at step t; at t = -1, without what changes from step to step, they say how far one is."""


def steps_of(level: Level, toy: Function, rate: float, seed: int, most: int) -> int:
    """Return after how many steps so little is left of a function; `most` where it is more."""
    angle = 2 * math.pi * torch.rand((), generator=torch.Generator().manual_seed(seed)).item()
    weight = nn.Parameter(2 * torch.tensor([math.cos(angle), math.sin(angle)], dtype=torch.float64))
    optimizer = Nested([weight], level, lr=rate)
    goal = NEAR * toy(weight.detach(), -1)
    for t in range(most):
        optimizer.zero_grad()
        toy(weight, t).backward()
        optimizer.step()
        now = toy(weight.detach(), -1)
        if now <= goal:
            return t + 1
        if not now.isfinite() or now > 1e6:
            break
    return most


def _tried(level: Level, toy: Function, seed: int, most: int, rates: Sequence[float]) -> dict[str, Any]:
    return {"found": [steps_of(level, toy, rate, seed, most) for rate in rates]}


def run(plan: Plan) -> list[dict[str, Any]]:
    """Measure all optimizers of the plan on all functions, and return the rows; scores are -log2 of the steps."""
    most, rates = (150, RATES[3:8:2]) if plan.quick else (2000, RATES)
    rows = []
    levels = {model: build("level", OPTIMIZERS.get(model, model), "--models") for model in plan.models}
    for name, model, seed in itertools.product(TOYS, plan.models, range(plan.seeds)):
        level = levels[model]
        assert isinstance(level, Level)
        tried = functools.partial(_tried, level, TOYS[name], seed, most, rates)
        row = plan.store.once(f"{name}, {model}, seed {seed}, {most} steps, {len(rates)} rates", tried)
        rows.append(({"task": name, "model": model, "limit": "steps", "seed": seed, **row}, name, model))
    best: dict[tuple[str, str], int] = {}
    for _, name, model in rows:
        every = [row["found"] for row, *of in rows if of == [name, model]]
        best[name, model] = min(range(len(rates)), key=lambda i: sum(math.log2(found[i]) for found in every))
    return [
        {
            **row,
            "rate": rates[best[name, model]],
            "steps": row["found"][best[name, model]],
            "scores": {"steps": -math.log2(row["found"][best[name, model]])},
        }
        for row, name, model in rows
    ]


OPTIMIZERS: Mapping[str, object] = {
    "momentum": {"level": "momentum", "beta": 0.9},
    "nesterov": {"level": "momentum", "beta": 0.9, "nesterov": True},
}
"""By names that are no level's, or with settings of their own."""
