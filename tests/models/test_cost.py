"""Memory that training takes, counted on tensors that hold no data."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nestopt.levels import cms, self_modifying
from nestopt.models import HopeLM
from nestopt.models.cost import peak_bytes


def test_counts_what_is_held_at_a_time() -> None:
    def run() -> None:
        a = torch.zeros(1000)
        b = a.view(10, 100) + 1  # a view takes nothing
        del a, b
        c = torch.zeros(1500)
        del c

    assert peak_bytes(run) == 8000
    with FakeTensorMode():
        assert peak_bytes(run) == 8000


def peak(length: int, segment: int) -> int:
    """Of a training step of Hope on one sequence."""
    mlp = cms(periods=(16,), learn="context", teach="loss", through="first_order")
    mixer = self_modifying(chunk=8, projection_chunk=16)
    model = HopeLM(vocab=64, dim=32, blocks=1, heads=2, mixer=mixer, mlp=mlp, segment=segment)
    tokens = torch.zeros(1, length + 1, dtype=torch.int64)
    return peak_bytes(lambda: model.loss(tokens, piece=32)[0].backward())  # noqa: PLW0108  # the forward counts, too


def test_with_segments_memory_grows_with_the_root_of_the_length() -> None:
    lengths = 64, 1024
    whole, cut = ([peak(n, s * 4 * math.isqrt(n)) for n in lengths] for s in (0, 1))
    assert whole[1] / whole[0] == pytest.approx(16, rel=0.15)
    assert cut[1] / cut[0] < 6  # √16 = 4; what is as long as the sequence, tokens and the residual stream, is small
