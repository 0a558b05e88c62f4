"""Levels that step in place: the same as `step`, and Adam and SGD the same as torch's to the bit."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import nestopt.optim
from nestopt.core import Descends, Level, Signal, start
from nestopt.core.registry import registry
from nestopt.levels import adam, adamw, momentum
from nestopt.optim import Nested

LEVELS: list[Level] = [
    *(momentum(0.9, d, n, u) for d, n, u in itertools.product([0.0, 0.3], [False, True], [False, True])),
    *(adam((0.8, 0.95), 1e-6, b, a) for b, a in itertools.product([False, True], [False, True])),
    adamw(weight_decay=0.1),
    adamw(weight_decay=0.0, amsgrad=True),
]


def test_every_level_that_descends_is_in_the_table() -> None:
    names = [name for name in registry.names("level") if issubclass(registry.get("level", name), Descends)]  # type: ignore[misc]
    assert sorted({level.label for level in LEVELS}) == sorted(names)


@pytest.mark.parametrize("level", LEVELS, ids=repr)
def test_in_place_is_step(level: Level) -> None:
    assert isinstance(level, Descends)
    stepped = torch.randn(4, 3, dtype=torch.float64)
    moved, lr = stepped.clone(), 0.05
    state, own = start(level, stepped), start(level, moved)
    for t in range(1, 20):
        grad = torch.randn_like(stepped)
        kept = grad.clone()
        direction, state = level.step(grad, state, Signal(t, stepped))
        stepped = stepped - lr * direction
        level.descend(moved, grad, own, Signal(t, moved), lr)
        assert torch.equal(grad, kept)
        torch.testing.assert_close(moved, stepped, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(own, state, rtol=1e-12, atol=1e-12)


FLAGS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    ("SGD", {"momentum": 0.9, "dampening": 0.3, "maximize": True}),
    *(("Adam", {"amsgrad": a, "weight_decay": w}) for a, w in itertools.product([False, True], [0.0, 0.1])),
    *(("AdamW", {"amsgrad": a, "maximize": m}) for a, m in itertools.product([False, True], [False, True])),
]


@pytest.mark.parametrize(("name", "flags"), FLAGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torchs_numbers_to_the_bit(name: str, flags: dict[str, Any], dtype: torch.dtype) -> None:
    theirs = [torch.randn(shape, dtype=dtype).requires_grad_() for shape in [(6, 5), (6, 5), (300,), ()]]
    ours = [param.detach().clone().requires_grad_() for param in theirs]
    # one tensor at a time, as torch itself does on the CPU: its other forms round otherwise
    one = getattr(torch.optim, name)(theirs, lr=0.1, foreach=False, **flags)
    two = getattr(nestopt.optim, name)(ours, lr=0.1, **flags)
    for _ in range(100):
        for a, b in zip(theirs, ours, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        one.step()
        two.step()
    for a, b in zip(theirs, ours, strict=True):
        assert torch.equal(a, b)


def test_a_narrow_parameter_is_stepped_wide() -> None:
    """bfloat16 weights have float32 state, and are rounded once a step."""
    param = torch.ones(4, dtype=torch.bfloat16, requires_grad=True)
    optimizer = Nested([param], adam(), lr=0.01)
    wide, state = param.detach().float(), start(adam(), torch.zeros(4))
    for t in range(1, 6):
        param.grad = torch.full((4,), 0.5, dtype=torch.bfloat16)
        optimizer.step()
        direction, state = adam().step(torch.full((4,), 0.5), state, Signal(t, wide))
        wide = (wide - 0.01 * direction).bfloat16().float()
        assert torch.equal(param.detach().float(), wide)
    assert optimizer.state[param]["exp_avg"].dtype == torch.float32
