"""Running a level over gradients, in both of its forms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nestopt.core import Level, Signal, advance, registry, start
from nestopt.core.clock import advance_
from nestopt.core.tree import State, leaves, tree_map

LINKS = {
    name
    for name in registry.names("level")
    if registry.get("level", name).__module__.rpartition(".")[2] in ("links", "recipes")
}
"""Links of a chain, and chains of them by a name: nobody makes a layer of one alone."""


def run(level: Level, grads: Sequence[Tensor], tolerance: float = 1e-9) -> Tensor:
    """All directions of `level` over `grads`; in place and with a tensor as step it must give the same."""
    param = torch.zeros_like(grads[0])
    state, out = start(level, param), []
    placed, traced = tree_map(torch.clone, state), tree_map(torch.clone, state)
    for t, grad in enumerate(grads, start=1):
        direction, state = advance(level, grad, state, Signal(t, param))
        in_place = advance_(level, grad.clone(), placed, Signal(t, param))
        by_tensor, traced = advance(level, grad, traced, Signal(torch.tensor(t), param))
        same(in_place, direction, tolerance)
        same(by_tensor, direction, tolerance)
        for other in (placed, traced):
            for (path, got), (_, want) in zip(leaves(other), leaves(state), strict=True):
                torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance, msg=lambda m, p=path: f"{p}: {m}")
        out.append(direction)
    return torch.stack(out)


def same(got: Tensor, want: Tensor, tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def randoms(*shape: int, count: int = 9) -> list[Tensor]:
    return [torch.randn(shape, dtype=torch.float64) for _ in range(count)]


def states(level: Level, grads: Sequence[Tensor]) -> list[State]:
    """The state after each of `grads`."""
    state, found = start(level, grads[0]), []
    for t, grad in enumerate(grads, start=1):
        _, state = advance(level, grad, state, Signal(t, torch.zeros_like(grad)))
        found.append(state)
    return found


def bytes_per_parameter(level: Level, *shape: int) -> float:
    param = torch.zeros(*shape)
    return sum(leaf.numel() * leaf.element_size() for _, leaf in leaves(start(level, param))) / param.numel()
