"""Memory that training takes, counted on tensors that hold no data."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nestopt.levels import cms, self_modifying
from nestopt.models import HopeLM
from nestopt.models.cost import Live, peak_bytes


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


def test_what_was_there_before_does_not_count() -> None:
    before = torch.zeros(1000)
    with Live() as live:
        before.add_(1)
        before.view(10, 100).mul_(2)
        torch._foreach_add_([before], 1)
        assert live.peak == 0
        made = before + 1
        made.add_(1)
    assert live.peak == live.now == 4000
    del made
    assert live.now == 0


def test_what_is_set_apart_counts_in_the_whole_only() -> None:
    with Live() as live:
        kept = torch.zeros(1000)
        live.set_apart(kept)
        other = torch.zeros(500)
        del kept, other
        third = torch.zeros(100)
    assert (live.peak, live.peak_else, live.now) == (6000, 4000, 400)
    assert third.numel() == 100


def test_counts_products_meanwhile() -> None:
    with Live() as live:
        torch.zeros(3, 4) @ torch.zeros(4, 5)
    assert live.flops == 2 * 3 * 4 * 5


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
