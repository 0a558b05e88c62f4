"""Held-out text read as streams, and a run beside a Transformer of its size."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from nestopt.levels import cms, deltanet
from nestopt.models import HopeLM
from nestopt.train.evaluate import stream_bits_per_byte


def make() -> HopeLM:
    torch.manual_seed(0)
    mlp = cms(periods=(3, 5), learn="context", teach="loss")
    return HopeLM(dim=8, blocks=2, heads=2, mixer=deltanet(), mlp=mlp).double()


@pytest.mark.parametrize("size", [2, 3, 17, 40])
@pytest.mark.parametrize("streams", [1, 3, 5])
@pytest.mark.parametrize("piece", [4, 100])
def test_each_byte_counts_once_and_is_read_from_all_of_its_stretch(size: int, streams: int, piece: int) -> None:
    model, text = make(), torch.randint(256, (size,), dtype=torch.uint8)
    length = math.ceil((size - 1) / min(streams, size - 1))
    nats = 0.0
    for start in range(0, size - 1, length):
        part = text[start : start + length + 1].long()[None]
        with torch.no_grad():
            logits, _ = model(part[:, :-1])
        nats += F.cross_entropy(logits[0].float(), part[0, 1:], reduction="sum").item()
    want = nats / (size - 1) / math.log(2)
    assert stream_bits_per_byte(model, text, streams=streams, piece=piece) == pytest.approx(want, rel=1e-6)
    parts = [stream_bits_per_byte(model, text, streams=streams, piece=piece, rank=r, world=2) for r in range(2)]
    assert sum(parts) == pytest.approx(want, rel=1e-6)


def test_what_it_reads_it_learns() -> None:
    model, text = make(), torch.tensor(list(b"abcab") * 60, dtype=torch.uint8)
    learning = stream_bits_per_byte(model, text, streams=2, piece=16)
    still = stream_bits_per_byte(model, text, streams=2, piece=16, learn="mixer")  # type: ignore[arg-type]
    assert learning < still - 0.5


def test_one_byte_is_no_text() -> None:
    with pytest.raises(ValueError, match="1 bytes can't be measured"):
        stream_bits_per_byte(make(), torch.zeros(1, dtype=torch.uint8), streams=1, piece=4)
