"""A model that is cast or moved after some steps: its optimizer goes on in the new dtype."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import nestopt
from nestopt import levels
from nestopt.core import Level, chain
from nestopt.optim import Nested

STACKS: dict[str, Callable[[], Level]] = {
    "momentum": levels.momentum,
    "adam": lambda: levels.adam(amsgrad=True),
    "adamw": levels.adamw,
    "muon": levels.muon,
    "m3": levels.m3,
    "shampoo": levels.shampoo,
    "deep_momentum": levels.deep_momentum,
    "delta_momentum": levels.delta_momentum,
    "clock": lambda: levels.momentum(period=3),
    "chain": lambda: chain(levels.momentum(), levels.adam()),
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def feed(optimizer: Nested, model: nn.Module, steps: range) -> None:
    for t in steps:
        for i, param in enumerate(model.parameters()):
            random = torch.Generator().manual_seed(10 * t + i)
            param.grad = torch.randn(param.shape, generator=random, dtype=torch.float64).to(param.dtype)
        optimizer.step()


@pytest.mark.parametrize("name", STACKS)
@settings(max_examples=12)
@given(st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.integers(0, 5), st.integers(1, 3), st.booleans())
def test_a_cast_model_goes_on_as_from_a_checkpoint(
    name: str, before: torch.dtype, after: torch.dtype, at: int, layers: int, period: bool
) -> None:
    model = nn.Sequential(*(nn.Linear(5, 4, bias=False) for _ in range(layers))).to(before)
    options = {"period": 2 if period else 1}
    one = Nested(model.named_parameters(), STACKS[name](), 0.05, **options)
    feed(one, model, range(at))
    one.zero_grad()
    other = copy.deepcopy(model).to(after)
    loaded = Nested(other.named_parameters(), STACKS[name](), 0.05, **options)
    loaded.load_state_dict(copy.deepcopy(one.state_dict()))
    model.to(after)
    feed(one, model, range(at, at + 4))
    feed(loaded, other, range(at, at + 4))
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert a.dtype == after
        assert a.isfinite().all()
        assert torch.equal(a, b)
        for key, value in one.state[a].items():
            assert torch.equal(value, loaded.state[b][key])
            assert key == "step" or value.dtype == (torch.float64 if after == torch.float64 else torch.float32)


def test_a_classifier_that_is_cast_by_double_trains_on() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = nestopt.optimizer(model, "muon", lr=0.02)

    def losses(x: Tensor) -> list[float]:
        found = []
        for _ in range(10):
            optimizer.zero_grad()
            loss = (model(x)[:, 0] - x.sum(1)).square().mean()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    x = torch.randn(32, 4)
    first = losses(x)
    model.double()
    second = losses(x.double())
    assert second[-1] < second[0] < first[0]
