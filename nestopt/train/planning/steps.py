"""The optimizer's step, taken by the optimizer itself on tensors without data."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from nestopt.core.gates import bind
from nestopt.core.level import Level
from nestopt.models.cost import Cost, Live
from nestopt.optim import Nested
from nestopt.optim.execute.update import STEP

CYCLE = 1 << 16
"""Steps that are looked through for those that cost more than others; clocks of nests are shorter."""


@dataclasses.dataclass(frozen=True)
class Stepped:
    """What the steps of some tensors take.

    Attributes:
        cost: of a step, on average over the levels' clocks.
        most: operations of matrix products of the step that has most.
        held: bytes of states.
        work: bytes of what a step makes and throws away again, at the most.
        states: shapes of the states by the names of tensors and keys.
    """

    cost: Cost = dataclasses.field(default_factory=Cost)
    most: float = 0
    held: int = 0
    work: int = 0
    states: Mapping[str, Mapping[str, torch.Size]] = dataclasses.field(default_factory=dict)

    def __add__(self, other: Stepped) -> Stepped:
        """Add what comes after: each has the work space for itself."""
        return Stepped(
            self.cost + other.cost,
            self.most + other.most,
            self.held + other.held,
            max(self.work, other.work),
            {**self.states, **other.states},
        )


def dry_step(group: Mapping[str, Any], shapes: Mapping[str, torch.Size], dtype: torch.dtype) -> Stepped:
    """Return steps of a parameter group on tensors of these shapes and of `dtype`, as an accelerator would take them.

    Args:
        group: settings of `Nested`'s group, without parameters.
        shapes: by name. An empty tensor is left out.
        dtype: of parameters and gradients.
    """
    params = {
        name: nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"))
        for name, shape in shapes.items()
        if shape.numel()
    }
    if not params:
        return Stepped()
    for param in params.values():
        param.grad = torch.empty_like(param)
    optimizer = Nested([{**group, "params": list(params.items())}])
    with Live("meta") as live:
        optimizer.step()
        held = live.now
    found = []
    steps, whole = _kinds(bind(optimizer.level(optimizer.param_groups[0])), group.get("period", 1))
    for step, often in steps:
        for state in optimizer.state.values():
            state[STEP].fill_(step - 1)
        with Live("meta") as live:
            optimizer.step()
        found.append((often, live.cost, live.peak))
    return Stepped(
        sum((cost * (often / whole) for often, cost, _ in found), Cost()),
        max(cost.flops for _, cost, _ in found),
        held,
        max(work for *_, work in found),
        {
            name: {key: leaf.shape for key, leaf in optimizer.state[param].items() if key != STEP}
            for name, param in params.items()
        },
    )


def _kinds(level: Level, period: int) -> tuple[Sequence[tuple[int, int]], int]:
    """Return steps of each kind, by which clocks are due or have just been, each with how many are like it."""
    periods = sorted({period, *(node.period * period for node in level.nodes("stack"))} - {1})
    cycle = min(math.lcm(*periods), CYCLE)
    # what is done at each of the first steps only, such as a start, is over by then
    late = range(cycle + 1, 2 * cycle + 1) if cycle > 1 else range(2, 3)
    kinds = [tuple(min(step % p, 2 if p > 2 else 1) for p in periods) for step in late]
    counted = Counter(kinds)
    first = {kind: step for step, kind in reversed(list(zip(late, kinds, strict=True)))}
    return [(first[kind], often) for kind, often in counted.items()], len(kinds)
