"""The training loop as its user meets it: it learns, it leaves what it says, and an interruption changes nothing."""

import json
import math
import signal
import subprocess
import sys
import time

import pytest
import torch

from nestopt.config import Config, ConfigError, load
from nestopt.train.checkpoints import file as checkpoint
from nestopt.train.checkpoints.shards import ShardReader
from nestopt.train.data.text import from_path, held_out_text
from nestopt.train.evaluate import bits_per_byte
from nestopt.train.loop import train
from nestopt.train.report.metrics import read
from nestopt.train.run import Run
from nestopt.train.training import Training


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A small text with something to learn in it."""
    path = tmp_path_factory.mktemp("text") / "words.txt"
    words = ["memory", "level", "clock", "gradient", "token", "rule"]
    generator = torch.Generator().manual_seed(0)
    order = torch.randint(len(words), (4000,), generator=generator).tolist()
    path.write_text(" ".join(words[i] for i in order))
    return path


def config(text, out, **changes):
    data = {
        "model": {"mixer": "attention", "dim": 16, "blocks": 1, "heads": 2},
        "optimizer": {"stack": "muon", "lr": 0.02},
        "data": {"path": str(text), "window": 32, "batch": 4},
        "train": {
            "steps": 20,
            "eval_every": 10,
            "eval_bytes": 500,
            "final_bytes": 500,
            "eval_streams": 0,
            "log_every": 5,
            "save_every": 10,
            "sample_bytes": 20,
            "out": str(out),
            "device": "cpu",
        },
    }
    for path, value in changes.items():
        section, key = path.split("__")
        data[section][key] = value
    return Config.from_data(data)


def test_a_run_learns_and_leaves_what_it_says(text, tmp_path, capsys):
    result = train(config(text, tmp_path, train__steps=60))
    assert result.finished
    records = read(result.run.metrics_file)
    assert records[-1]["eval/bits_per_byte"] == result.bits_per_byte
    assert result.bits_per_byte < records[0]["train/bits_per_byte"] - 1
    assert records[0]["train/bits_per_byte"] == pytest.approx(records[0]["train/loss"] / math.log(2))
    for name in ("config.yaml", "metrics.jsonl", "loss.png", "samples.txt", "model.safetensors"):
        assert (result.run.path / name).stat().st_size > 0, name
    assert load(result.run.config_file) == config(text, tmp_path, train__steps=60)
    printed = capsys.readouterr().out
    for word in ("unigram", "trigram", "gzip -9", "this model", f"{result.bits_per_byte:.3f}", str(result.run.path)):
        assert word in printed
    assert f"the run has ended: {result.ended}" in printed
    assert result.ended == "its steps are done (train.steps=60)"


def test_a_run_says_that_its_time_is_over(text, tmp_path):
    result = train(config(text, tmp_path, train__steps=100_000, train__seconds=0.5, train__eval_every=0), quiet=True)
    assert result.finished
    assert result.ended.startswith(f"its time is over (train.seconds=0.5) after {result.step:,} of 100,000 steps")


def test_the_saved_model_is_the_one_that_was_measured(text, tmp_path):
    result = train(config(text, tmp_path), quiet=True)
    held_out = torch.from_numpy(held_out_text(from_path(text).held_out, 500))
    again = bits_per_byte(result.run.load_model(), held_out, window=32, batch=16)
    assert again == pytest.approx(result.bits_per_byte, rel=1e-6)


@pytest.mark.parametrize("level", ["weight_average", "schedule_free"])
def test_averages_are_measured_and_saved_and_training_knows_nothing_of_it(text, tmp_path, level):
    stack = {"level": level, "inner": "muon"} | ({"decay": 0.8} if level == "weight_average" else {})
    result = train(config(text, tmp_path, optimizer__stack=stack), quiet=True)
    held_out = torch.from_numpy(held_out_text(from_path(text).held_out, 500))
    again = bits_per_byte(result.run.load_model(), held_out, window=32, batch=16)
    assert again == pytest.approx(result.bits_per_byte, rel=1e-6)
    seldom = train(config(text, tmp_path, optimizer__stack=stack, train__eval_every=0), quiet=True)
    assert seldom.bits_per_byte == result.bits_per_byte
    if level == "weight_average":
        plain = train(config(text, tmp_path, optimizer__stack="muon"), quiet=True)
        losses = [[row["train/loss"] for row in rows(run) if "train/loss" in row] for run in (plain.run, result.run)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)  # other kernels round otherwise
        assert plain.bits_per_byte != result.bits_per_byte


def rows(run):
    """What is measured, without what depends on the machine's speed."""
    return [
        {k: v for k, v in r.items() if k not in ("seconds", "train/tokens_per_second")} for r in read(run.metrics_file)
    ]


@pytest.mark.parametrize(
    "stack",
    [
        "muon",
        {"level": "chain", "levels": [{"level": "momentum", "period": 3}, "adam"]},
        {"level": "nest", "outer": {"level": "momentum", "period": 4}, "inner": "adam"},
        {"level": "nest", "of": "weights", "outer": "gd", "inner": "muon", "period": 4},
        {"level": "schedule_free", "inner": {"level": "momentum", "beta": {"schedule": {0: 0.5, 15: 0.9}}}},
    ],
)
def test_an_interrupted_run_goes_on_exactly(text, tmp_path, stack, monkeypatch):
    whole = train(config(text, tmp_path / "whole", optimizer__stack=stack), quiet=True)

    # stopped at step 13, in the middle of periods, by the signal that Ctrl-C sends

    update = Training._update

    def interrupting(self):
        if self.step == 12:
            signal.raise_signal(signal.SIGINT)
        return update(self)

    monkeypatch.setattr(Training, "_update", interrupting)
    part = train(config(text, tmp_path / "parts", optimizer__stack=stack), quiet=True)
    monkeypatch.undo()
    assert not part.finished
    assert part.step == 13
    assert part.ended == "SIGINT at step 13"
    result = train(resume=part.run.path, quiet=True)
    assert result.finished
    assert rows(result.run) == rows(whole.run)
    ours, _ = checkpoint.load(result.run.model_file)
    theirs, _ = checkpoint.load(whole.run.model_file)
    for name, value in theirs.items():
        assert torch.equal(ours[name], value), name


def test_a_killed_run_goes_on_from_its_last_checkpoint(text, tmp_path):
    settings = config(text, tmp_path, train__steps=100_000, train__save_every=1, train__eval_every=0)
    path = tmp_path / "config.yaml"
    path.write_text(settings.to_yaml())
    process = subprocess.Popen([sys.executable, "-m", "nestopt", "train", str(path), "-q"])
    try:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("001/checkpoint.json")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    run = Run.open(tmp_path / "001")
    with ShardReader(run.path) as parts:
        meta = parts.meta
    short = run.config()
    short.train.steps = meta["step"] + 3
    result = train(short, resume=run.path, quiet=True)
    assert result.finished
    assert result.step == meta["step"] + 3


def test_a_time_limit_ends_the_run_with_a_full_schedule(text, tmp_path):
    no_pauses = {"train__eval_every": 0, "train__save_every": 0}
    result = train(
        config(text, tmp_path, train__steps=1_000_000, train__seconds=3.0, train__log_every=1, **no_pauses), quiet=True
    )
    assert result.finished
    assert 0 < result.step < 1_000_000
    rates = [r["lr"] for r in read(result.run.metrics_file) if "lr" in r]
    assert rates[-1] < 0.2 * max(rates)


def test_a_checkpoint_of_another_model_is_refused(text, tmp_path):
    part = train(config(text, tmp_path), quiet=True)
    for change, word in (({"model__dim": 32}, "another model"), ({"optimizer__stack": "adam"}, "optimizer")):
        with pytest.raises(checkpoint.CheckpointError, match=word):
            train(config(text, tmp_path, **change), resume=part.run.path, quiet=True)


def test_a_folder_that_is_no_run(tmp_path):
    (tmp_path / "001").mkdir()
    with pytest.raises(ConfigError, match=r"no config.yaml"):
        train(resume=tmp_path / "001")


def test_two_runs_do_not_share_a_folder(text, tmp_path):
    one, two = (Run.create(config(text, tmp_path)) for _ in range(2))
    assert (one.path.name, two.path.name) == ("001", "002")


class Unigram(torch.nn.Module):
    """Knows only how often each byte comes."""

    def __init__(self, counts):
        super().__init__()
        self.logits = torch.nn.Parameter((counts / counts.sum()).log())

    def forward(self, tokens, learn):
        return self.logits.expand(*tokens.shape, -1), None


@pytest.mark.parametrize(("length", "window"), [(2, 8), (9, 8), (10, 8), (100, 8), (101, 7), (64, 1)])
def test_each_held_out_byte_counts_once(length, window):
    text = torch.randint(0, 256, (length,), dtype=torch.uint8)
    counts = torch.rand(256, dtype=torch.float64) + 0.1
    model = Unigram(counts)
    want = sum(-math.log2(counts[byte] / counts.sum()) for byte in text.tolist()[1:]) / (length - 1)
    assert bits_per_byte(model, text, window=window, batch=3) == pytest.approx(want, rel=1e-6)
    parts = [bits_per_byte(model, text, window=window, batch=3, rank=rank, world=2) for rank in range(2)]
    assert sum(parts) == pytest.approx(want, rel=1e-6)


def test_held_out_stretches_are_spread():
    import numpy as np

    whole = (np.arange(10_000) // 100).astype(np.uint8)
    some = held_out_text(whole, 1_000)
    assert len(some) == 1_000
    assert some[0] == whole[0]
    assert some[-1] == whole[-1]
    assert len(np.unique(some)) >= 16
    assert held_out_text(whole, 20_000) is whole


def test_metrics_are_json_that_other_tools_read(text, tmp_path):
    result = train(config(text, tmp_path), quiet=True)
    lines = result.run.metrics_file.read_text().splitlines()
    assert "eval/bits_per_byte" in json.loads(lines[-1])


@pytest.mark.parametrize(
    ("precision", "dtype", "why"),
    [("tf32", "float32", "the device is 'cpu'"), ("bfloat16", "float64", "the memories are float64")],
)
def test_a_precision_that_is_not_there_is_refused_before_there_is_a_run(text, tmp_path, precision, dtype, why):
    settings = config(text, tmp_path, model__precision=precision, train__dtype=dtype)
    with pytest.raises(ConfigError, match=rf"^model.precision: '{precision}' is not allowed; {why}.*give float32"):
        train(settings, quiet=True)
    assert not list(tmp_path.iterdir())


def test_a_run_in_bfloat16_products_is_kept_so_and_can_be_loaded_otherwise(text, tmp_path):
    run = train(config(text, tmp_path, model__precision="bfloat16", model__mixer="deltanet"), quiet=True).run
    assert run.config().model.precision == run.load_model().precision == "bfloat16"
    assert run.load_model(precision="float32").blocks[0].mixer.precision == "float32"
    with pytest.raises(ConfigError, match=r"model.precision: 'tf32' .* or --precision float32"):
        run.load_model(precision="tf32")
