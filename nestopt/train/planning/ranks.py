"""A step of many processes, run through on tensors without data: who owns, computes, keeps and sends what."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nestopt.config import Config, ConfigError
from nestopt.models.build import build_model
from nestopt.optim.sharded.owners import imbalance
from nestopt.train.planning.parts import Parts
from nestopt.train.planning.sharing import Sharing

NUMBER = 4
"""Bytes of a number on its way to an owner, or back: gradients and masters travel in float32."""

TOKENS = 65
"""Of the pass that gives the gradients, unless windows are shorter; shapes don't depend on how many there are."""


@dataclasses.dataclass(frozen=True)
class Rank:
    """What one process has to do with a step.

    Attributes:
        owned: names of the tensors that it steps whole.
        cost: of their steps, as owners are balanced by.
        flops: of matrix products, a step, on average over the levels' clocks.
        states: bytes of the states that it keeps: of its own tensors, and of its slices of others.
        sent, received: bytes of gradients and masters, to owners and back.
        shapes: of the states, by tensor and key.
    """

    owned: Sequence[str]
    cost: float
    flops: float
    states: int
    sent: int
    received: int
    shapes: Mapping[str, Mapping[str, torch.Size]]


@dataclasses.dataclass(frozen=True)
class Simulation:
    """All processes, in order.

    Attributes:
        ranks: one each.
        owner: of each tensor that is stepped whole.
        balance: cost of the process with most, of the mean: 1 is perfect.
        without: tensors that get no gradient in a pass as short as the simulation's, such as rates of writes to come.
    """

    ranks: Sequence[Rank]
    owner: Mapping[str, int]
    balance: float
    without: Sequence[str]

    def uneven(self, name: str) -> float:
        """Return the largest `Rank` number of this name, of the mean: 1 is perfect."""
        values = [getattr(rank, name) for rank in self.ranks]
        mean = sum(values) / len(values)
        return max(values) / mean if mean else 1.0


def simulate(config: Config, sharing: Sharing) -> Simulation:
    """Run the whole model forward and backward, and each process's part of the step, on tensors without data.

    Nothing is sent: what would be is added up, from slices of equal size of every tensor to its owner and back.

    Args:
        config: model and optimizer.
        sharing: one that spreads states (ZeRO 1 and up, or FSDP2).

    Raises:
        ConfigError: a sharing in which every process steps everything.
        RuntimeError: a tensor that the optimizer has gets a gradient of another shape.
    """
    if not sharing.spreads_states:
        raise ConfigError.refuse("--ranks", str(sharing), "every process steps everything; give --zero 1, 2 or 3")
    parts = Parts.of(config)
    without = _without_gradient(config, parts)
    costs = parts.costs()
    owner = parts.owners(sharing.world)
    sent, received = traffic({name: parts.shapes[name].numel() for name in owner}, owner, sharing)
    ranks = []
    for rank in range(sharing.world):
        done = parts.step(sharing, rank, owner)
        owned = [name for name, own in owner.items() if own == rank]
        cost = sum(costs[name] for name in owned)
        ranks.append(Rank(owned, cost, done.cost.flops, done.held, sent[rank], received[rank], done.states))
    return Simulation(ranks, owner, imbalance(costs, owner, sharing.world), without)


def _without_gradient(config: Config, parts: Parts) -> list[str]:
    with FakeTensorMode():
        model = build_model(config.model)
        tokens = torch.zeros(1, min(TOKENS, config.data.window) + 1, dtype=torch.int64)
        model.loss(tokens)[0].backward()
        found = {name: None if p.grad is None else p.grad.shape for name, p in model.named_parameters()}
    for name, shape in parts.shapes.items():
        if found[name] not in (None, shape):
            raise RuntimeError(f"{name}: its gradient has the shape {found[name]}, and it {shape}")
    return [name for name in parts.shapes if found[name] is None]


def traffic(numel: Mapping[str, int], owner: Mapping[str, int], sharing: Sharing) -> tuple[list[int], list[int]]:
    """Return the bytes that each process sends and receives in a step: gradients and masters to owners, and back."""
    sent, received = [0] * sharing.world, [0] * sharing.world
    for name, own in owner.items():
        for rank in range(sharing.world):
            size = NUMBER * sharing.part(numel[name], rank)
            if rank != own:
                sent[rank] += 2 * size
                received[own] += 2 * size
                sent[own] += size
                received[rank] += size
    return sent, received
