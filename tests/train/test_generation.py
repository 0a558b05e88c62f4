"""A model that reads, writes, and goes on from a file."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nestopt.core.memories import Window
from nestopt.core.tree import leaves
from nestopt.levels import cms, deltanet, self_modifying, window_attention
from nestopt.models import HopeLM
from nestopt.train.checkpoints import file as checkpoint
from nestopt.train.errors import CheckpointError
from nestopt.train.generation import PIECE, Writer

TEXT = bytes(range(32, 127)) * 3


def make(mixer: object = None, **options: object) -> HopeLM:
    torch.manual_seed(0)
    settings = {"periods": (4, 16), "learn": "context", "teach": "loss", "rate": 0.3, **options}
    mlp = cms(**settings)  # type: ignore[arg-type]
    return HopeLM(dim=8, blocks=2, heads=2, mixer=mixer or deltanet(), mlp=mlp).eval()  # type: ignore[arg-type]


def greedy(logits: Tensor) -> Tensor:
    return logits.argmax(-1)


def test_it_goes_on_as_the_model_does() -> None:
    writer, prompt = Writer(make()), torch.tensor([list(TEXT)])
    writer.read(TEXT[:100])
    writer.read(TEXT[100:])
    written = writer.write(9, greedy)
    with torch.no_grad():
        tokens, _ = make().generate(prompt, 9, greedy)
    assert written == tokens[0, len(TEXT) :].tolist()
    assert writer.write(0, greedy) == []


def test_long_documents_are_read_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, pieces = Writer(make()), Writer(make())
    whole.read(TEXT)
    monkeypatch.setattr("nestopt.train.generation.PIECE", 7)
    pieces.read(TEXT)
    assert PIECE > 7
    torch.testing.assert_close(dict(leaves(pieces.state)), dict(leaves(whole.state)), rtol=1e-4, atol=1e-5)
    assert pieces.waiting == whole.waiting == [TEXT[-1]]


@pytest.mark.parametrize("mixer", [deltanet(), self_modifying(chunk=4, projection_chunk=8), window_attention()])
def test_it_goes_on_from_a_file(mixer: object, tmp_path: Path) -> None:
    one, path = Writer(make(mixer)), tmp_path / "state.safetensors"
    one.read(TEXT[:50])
    one.write(3, greedy)
    one.save(path)
    other = Writer(make(mixer))
    other.load(path)
    assert other.write(8, greedy) == one.write(8, greedy)
    other.load(path)
    other.read(b"and more")
    assert len(other.write(4, greedy)) == 4


def test_a_state_of_another_model_or_none_is_refused(tmp_path: Path) -> None:
    writer = Writer(make())
    writer.read(b"abcd")
    writer.save(tmp_path / "state.safetensors")
    other = Writer(HopeLM(dim=16, blocks=2, heads=2, mixer=deltanet(), mlp=make().blocks[0].mlp.level))
    with pytest.raises(ValueError, match=r"HopeLM.*block_0.*must be"):
        other.load(tmp_path / "state.safetensors")
    checkpoint.save(tmp_path / "weights.safetensors", make().state_dict(), {})
    with pytest.raises(CheckpointError, match="is not a state"):
        writer.load(tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="nothing was read"):
        Writer(make()).write(1, greedy)


def test_without_learning_the_mlps_stay() -> None:
    still, learning = Writer(make(), "mixer"), Writer(make())
    for writer in (still, learning):
        writer.read(TEXT)
    start = make().init_state(1)["block_0"]["mlp"]["levels"]["every_4"]["weights"]["W1"]
    assert still.state is not None
    assert learning.state is not None
    torch.testing.assert_close(still.state["block_0"]["mlp"]["levels"]["every_4"]["weights"]["W1"], start)
    assert not learning.state["block_0"]["mlp"]["levels"]["every_4"]["weights"]["W1"].equal(start)


def held(writer: Writer) -> int:
    assert writer.state is not None
    return sum(leaf.numel() * leaf.element_size() for _, leaf in leaves(writer.state))


@pytest.mark.parametrize("times", [20, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_long_document_takes_no_more_memory_than_a_short_one(times: int) -> None:
    """With 1,000: a million bytes."""
    writer = Writer(make(window_attention(memory=Window(32)), periods=(256, 512)))
    writer.read(b"x" * PIECE)
    before = held(writer)
    tracemalloc.start()
    for _ in range(times):
        writer.read(TEXT * 4)
    now, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held(writer) == before
    assert peak < 2**20  # Python's own; tensors are in the state alone
    assert all(leaf.isfinite().all() for _, leaf in leaves(writer.state or {}) if leaf.is_floating_point())
    assert now < 2**19
