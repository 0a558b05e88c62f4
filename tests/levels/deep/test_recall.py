"""What memories of weights recall at their defaults, beside DeltaNet: the measure of the step's strength."""

from __future__ import annotations

import functools

import pytest

from benchmarks.recall import one_pass
from nestopt.levels import deltanet, dla, titans, ttt
from nestopt.parts import Mlp

SIZES = ((8, 16), (16, 16), (8, 32), (32, 32))


@functools.cache
def of_deltanet(pairs: int, dim: int) -> float:
    return one_pass(deltanet(), pairs, dim)[1]


@pytest.mark.parametrize("chunk", [1, 16, 64])
@pytest.mark.parametrize("level", [ttt, titans, dla])
def test_one_pass_is_recalled_nearly_as_by_deltanet(level: type[ttt], chunk: int) -> None:
    for pairs, dim in SIZES:
        assert one_pass(level(chunk=chunk), pairs, dim)[1] >= 0.85 * of_deltanet(pairs, dim)


def test_the_step_of_all_layers_together_hardly_writes() -> None:
    assert one_pass(ttt(memory=Mlp(), chunk=16, normalized=True), 8, 16)[1] < 0.25
