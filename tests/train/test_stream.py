"""Held-out text read as streams, and a run beside a Transformer of its size."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from nestopt.cli import main
from nestopt.config import Config
from nestopt.levels import attention, cms, deltanet, window_attention
from nestopt.models import HopeLM
from nestopt.train.compare import parameters, transformer_like
from nestopt.train.evaluate import stream_bits_per_byte
from nestopt.train.report.metrics import read


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


def test_a_transformer_of_as_many_parameters() -> None:
    config = Config.from_data({"model": {"mixer": "deltanet", "gate_output": True, "dim": 32, "heads": 2}})
    config.train.eval_streams = 0
    other = transformer_like(config)
    assert other.model.mixer == attention()
    assert parameters(other.model) == pytest.approx(parameters(config.model), rel=0.005)
    assert other.optimizer == config.optimizer
    assert other.data == config.data
    streaming = config.model_copy(update={"train": config.train.model_copy(update={"eval_streams": 4})})
    mixer = transformer_like(streaming).model.mixer
    assert isinstance(mixer, window_attention)
    assert mixer.memory.size == config.data.window


def test_a_run_beside_its_baseline(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one level two level three level " * 400)
    given = "model.dim=8 model.blocks=1 model.heads=2 data.window=16 data.batch=2 train.steps=6 train.eval_every=3"
    more = "train.final_bytes=300 train.eval_bytes=300 train.eval_streams=2 train.sample_bytes=0"
    assert (
        main(
            [
                "train",
                *given.split(),
                *more.split(),
                f"train.out={tmp_path}/runs",
                "--data",
                str(text),
                "--baseline",
                "transformer",
            ]
        )
        == 0
    )
    said = capsys.readouterr().out
    lines = said[said.index("parameters  steps") :].splitlines()
    assert [line.rpartition("  ")[0].split("  ")[0].strip() for line in lines[1:4]] == [
        "this model",
        "Transformer, equal tokens",
        "Transformer, equal seconds",
    ]
    run = tmp_path / "runs" / "001"
    assert (run / "compare.png").stat().st_size > 10_000
    tokens, seconds = (read(run / "baseline" / name / "metrics.jsonl") for name in ("001", "002"))
    assert tokens[-1]["step"] == 6
    assert seconds[-1]["step"] >= 1
