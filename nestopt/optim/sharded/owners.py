"""Who computes what: each tensor that a level must see whole belongs to one process, balanced by what it costs."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from nestopt.core.clock import advance, start
from nestopt.core.level import Level
from nestopt.core.signal import Signal
from nestopt.optim.views import Split, matrix_view

log = logging.getLogger("nestopt")

PASSES = 20
"""A number that a step reads and writes some times over counts as so many multiplications."""


def step_cost(level: Level, shape: torch.Size, view: Split | None = None) -> float:
    """Return what a step of `level` on a tensor of this shape costs, in multiplications and additions of matrix
    products.

    Counted on tensors without data, at the first step: what is done once in many steps is not in it. Of a level whose
    step looks at values, products as large as the matrix with its shorter side are taken for its cost.
    """
    shown = matrix_view(torch.empty(shape, device="meta"), level, view)
    if view is None or not view.stacked:
        return _cost(_Key(level), shown.shape)
    return len(shown) * _cost(_Key(level), shown.shape[1:])


class _Key:
    """A level as a key of the cache: parts are compared by what they are made of, and have no hash."""

    def __init__(self, level: Level) -> None:
        self.level, self.text = level, repr(level)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and type(self.level) is type(other.level) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)


@lru_cache(maxsize=4096)
def _cost(key: _Key, shape: torch.Size) -> float:
    level, numel = key.level, shape.numel()
    try:
        grad, param = torch.empty(shape, device="meta"), torch.empty(shape, device="meta")
        counter = FlopCounterMode(display=False, custom_mapping=_DECOMPOSITIONS)
        with torch.no_grad(), counter:
            advance(level, grad, start(level, param), Signal(level.period, param, 1.0))
        products = float(counter.get_total_flops())
    except (RuntimeError, NotImplementedError) as error:
        log.info("%s can't be counted on tensors without data (%s); its cost is taken from shapes", level.label, error)
        products = 4.0 * numel * (min(shape[0], numel // shape[0]) if len(shape) > 1 else 1)
    return products + PASSES * numel


def _cubed(shape: torch.Size, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 9 * torch.Size(shape).numel() * shape[-1]


_DECOMPOSITIONS = {torch.ops.aten._linalg_eigh: _cubed}
"""Not in torch's own list; about 9 n³ with eigenvectors (Golub & Van Loan, 8.3)."""


def owners(costs: Mapping[str, float], world: int) -> dict[str, int]:
    """Return the owner of each tensor: a process, 0 … `world` - 1, so that none has much more to do than the others.

    The dearest goes first, to whoever has least; then tensors are moved and exchanged as long as the most loaded
    process gains by it. The same on every process, whatever the order of `costs`.
    """
    order = sorted(costs, key=lambda name: (-costs[name], name))
    load, found = [0.0] * world, {}
    for name in order:
        rank = load.index(min(load))
        found[name] = rank
        load[rank] += costs[name]
    while _improved(costs, found, load):
        pass
    return found


def _improved(costs: Mapping[str, float], found: dict[str, int], load: list[float]) -> bool:
    """Take load off the most loaded process, by a move or an exchange; whether there was one."""
    top = load.index(max(load))
    mine = sorted((name for name, rank in found.items() if rank == top), key=lambda name: (costs[name], name))
    best, least = None, load[top] * (1 - 1e-9)
    distinct = {costs[name]: name for name in reversed(mine)}
    for rank in range(len(load)):
        if rank == top:
            continue
        others: dict[float, str | None] = {costs[name]: name for name in sorted(found) if found[name] == rank}
        others[0.0] = None
        for give, name in distinct.items():
            for take, other in others.items():
                after = max(load[top] - give + take, load[rank] + give - take)
                if after < least:
                    best, least = (name, other, rank), after
    if best is None:
        return False
    name, other, rank = best
    moved = costs[name] - (costs[other] if other else 0.0)
    found[name] = rank
    if other is not None:
        found[other] = top
    load[top] -= moved
    load[rank] += moved
    return True


def imbalance(costs: Mapping[str, float], found: Mapping[str, int], world: int) -> float:
    """Return how much the most loaded process has to do, of the mean over all: 1 is perfect."""
    load = [0.0] * world
    for name, rank in found.items():
        load[rank] += costs[name]
    mean = sum(load) / world
    return max(load) / mean if mean else 1.0
