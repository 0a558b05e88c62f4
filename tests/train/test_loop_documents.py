"""A run on documents: from shards to text, and on from where it stopped."""

from __future__ import annotations

import itertools
import signal

import pytest
import torch

from nestopt.cli import main
from nestopt.config import Config
from nestopt.train.data.codec import Bytes, codec_of
from nestopt.train.data.sources import make
from nestopt.train.evaluate import documents_bits
from nestopt.train.loop import train
from nestopt.train.report.metrics import read
from nestopt.train.training import Training
from tests.train.data.parquet import write_shards

pytest.importorskip("datasets")
pytest.importorskip("tokenizers")


def config(folder, out, **train_section):
    return Config.from_data(
        {
            "model": {"dim": 16, "blocks": 2, "heads": 2, "vocab": 400, "mixer": "deltanet"},
            "optimizer": {"stack": {"level": "muon", "dtype": "float32"}},
            "data": {
                "dataset": {
                    "dataset": "documents",
                    "path": str(folder),
                    "tokenizer": str(folder / "tokenizer.json"),
                    "held_out": 10,
                },
                "window": 32,
                "batch": 4,
            },
            "train": {
                "steps": 20,
                "log_every": 1,
                "eval_every": 10,
                "final_bytes": 600,
                "eval_bytes": 300,
                "save_every": 0,
                "sample_bytes": 5,
                "accumulate": 2,
                "device": "cpu",
                "out": str(out),
                **train_section,
            },
        }
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"))


def rows(run):
    return [{k: v for k, v in row.items() if "second" not in k} for row in read(run.metrics_file)]


def test_a_run_that_is_interrupted_goes_on_at_the_next_sample(folder, tmp_path, monkeypatch, capsys):
    whole = train(config(folder, tmp_path / "whole"), quiet=True)
    assert whole.finished
    assert whole.baselines == {}
    losses = [row["train/loss"] for row in rows(whole.run) if "train/loss" in row]
    assert losses[-1] < losses[0] - 0.3
    update = Training._update

    def interrupting(self):
        if self.step == 12:
            signal.raise_signal(signal.SIGINT)
        return update(self)

    monkeypatch.setattr(Training, "_update", interrupting)
    part = train(config(folder, tmp_path / "parts"), quiet=True)
    monkeypatch.undo()
    assert part.step == 13
    result = train(resume=part.run.path, quiet=True)
    assert rows(result.run) == rows(whole.run)

    assert (whole.run.path / "samples.txt").read_text().count("def") == 2
    assert main(["generate", str(whole.run.path), "--prompt", "a clock", "--length", "6"]) == 0
    assert capsys.readouterr().out.startswith("a clock")


def test_micro_batches_weigh_documents_as_the_whole_batch_does(folder, tmp_path):
    """Each has other numbers of targets; the gradient is that of the mean over all of them."""
    found = []
    for accumulate in (1, 4):
        result = train(config(folder, tmp_path / str(accumulate), accumulate=accumulate, steps=4), quiet=True)
        found.append([row["train/loss"] for row in rows(result.run) if "train/loss" in row])
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_held_out_documents_are_measured_as_each_alone(folder, tmp_path):
    settings = config(folder, tmp_path, steps=1, eval_every=0)
    lm = train(settings, quiet=True).run.load_model()
    source = make(settings)
    held = source.held_out(600)
    bits = documents_bits(lm, held.tokens, held.starts, window=10_000, batch=2)
    firsts = [*held.starts.nonzero()[:, 0].tolist(), len(held.tokens)]
    total, count = 0.0, 0
    for low, high in itertools.pairwise(firsts):
        loss, _ = lm.loss(held.tokens[None, low:high], reduction="sum")
        total, count = total + float(loss.detach()), count + high - low - 1
    assert bits == pytest.approx(total / count / torch.log(torch.tensor(2.0)).item(), rel=1e-5)
    windows = documents_bits(lm, held.tokens, held.starts, window=16, batch=3)
    assert windows == pytest.approx(bits, rel=0.1)  # shorter contexts
    parts = [
        documents_bits(lm, held.tokens, held.starts, window=16, batch=3, rank=rank, world=3, total=lambda nats: nats)
        for rank in range(3)
    ]
    assert sum(parts) == pytest.approx(windows, rel=1e-6)


def test_letters_of_several_tokens_are_shown_when_they_are_whole(folder, tmp_path):
    text = codec_of(config(folder, tmp_path))
    tokens = text.encode("a clock ünd".encode())
    assert text.encode(b"") == []
    shown = [text.add(token) for token in tokens]
    assert "".join(shown) + text.end() == "a clock ünd"
    assert "" in shown
    plain = Bytes()
    assert [plain.add(byte) for byte in "ü".encode()] == ["", "ü"]
