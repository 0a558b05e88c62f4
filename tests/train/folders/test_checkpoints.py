"""Which checkpoints stay, what they are good for, and that nothing else in the folder goes."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from nestopt.cli import main
from nestopt.config import ConfigError
from nestopt.train import training
from nestopt.train.checkpoints import file as checkpoint
from nestopt.train.checkpoints.shards import ShardReader
from nestopt.train.errors import CheckpointError
from nestopt.train.loop import train
from nestopt.train.report.metrics import read
from nestopt.train.run import Run
from nestopt.train.training import Training
from tests.train.folders.small import content, rows, same_ends, small


def parts(folder: Path) -> list[int]:
    """The numbers of the saves that are there."""
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*-part-*"))


def test_what_others_have_put_there_stays(text, tmp_path):
    config = small(text, tmp_path, train__steps=3)
    run = train(config, quiet=True).run
    names = [
        "checkpoint-best.safetensors",
        "checkpoint-7-part-1-of-1.safetensors",
        "checkpoint-1-part-2-of-2.safetensors",
    ]
    for name in names:
        (run.path / name).write_text("mine")
    config.train.steps = 12
    train(config, resume=run.path, quiet=True)
    for name in names:
        assert (run.path / name).read_text() == "mine"
    assert not (run.path / "checkpoint-1-part-1-of-1.safetensors").exists()


@pytest.mark.parametrize("keep", [1, 3])
def test_the_last_stay_and_the_best(text, tmp_path, keep, monkeypatch):
    scores = iter([3.0, 1.0, 2.0, 4.0, 5.0, 6.0])
    config = small(text, tmp_path, train__steps=24, train__keep=keep, train__save_every=2)
    with monkeypatch.context() as patch:
        patch.setattr(Training, "_evaluate", lambda self, held_out: next(scores))
        run = train(config, quiet=True).run
    with ShardReader(run.path) as last:
        numbers = [item.number for item in last.kept]
        assert last.meta["step"] == 24
        best = min((item for item in last.kept if item.score is not None), key=lambda item: item.score)
    assert best.score == 1.0
    assert numbers == sorted({*numbers[-keep:], best.number})
    assert len(numbers) == keep + 1
    assert parts(run.path) == numbers
    with ShardReader(run.path / f"checkpoint-{best.number}.json") as older:
        assert older.meta["step"] == 8
    assert len(list(run.path.glob("checkpoint-*.json"))) == keep
    new = train(
        small(text, tmp_path, train__steps=1), init_from=run.path / f"checkpoint-{best.number}.json", quiet=True
    )
    assert new.finished


def test_ctrl_c_while_measuring_loses_nothing(text, tmp_path, ended, monkeypatch, capsys):
    def interrupted(self, held_out):
        raise KeyboardInterrupt

    config = small(text, tmp_path, train__save_every=5, train__eval_every=0)
    with monkeypatch.context() as patch:
        patch.setattr(Training, "_evaluate", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert f"--resume {tmp_path / '001'}" in capsys.readouterr().out
    before = read(tmp_path / "001" / "metrics.jsonl")
    again = train(resume=tmp_path / "001", quiet=True)
    assert again.step == 12
    assert read(again.run.metrics_file)[:-1] == before


def test_a_run_that_ended_is_gone_on_with_or_left_as_it_is(text, tmp_path, copy):
    before = content(copy.path)
    result = train(resume=copy.path, quiet=True)
    assert result.finished
    assert result.bits_per_byte == read(copy.metrics_file)[-1]["eval/bits_per_byte"]
    assert content(copy.path) == before
    config = copy.config()
    config.train.steps = 14
    assert train(config, resume=copy.path, quiet=True).step == 14
    assert [row["step"] for row in rows(copy) if "train/loss" in row] == list(range(1, 15))


def test_a_run_that_is_shorter_than_save_every_goes_on(text, tmp_path):
    config = small(text, tmp_path / "a", train__steps=3, train__save_every=0, train__decay=0.0, train__warmup=0.0)
    run = train(config, quiet=True).run
    config.train.steps = 6
    longer = train(config, resume=run.path, quiet=True).run
    config.train.out = str(tmp_path / "b")
    whole = train(config, quiet=True).run
    losses = [[row["train/loss"] for row in rows(run) if "train/loss" in row] for run in (longer, whole)]
    assert losses[0] == losses[1]


def flipped(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["checkpoint.json", "part", "model.safetensors"])
def test_a_flipped_bit_is_noticed_anywhere(copy, refused, name):
    path = next(copy.path.glob("checkpoint-*-part-*")) if name == "part" else copy.path / name
    if name != "model.safetensors":
        copy.model_file.unlink()
    whole = path.read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 60)):
        flipped(path, place)
        with pytest.raises(CheckpointError, match=r"checkpoint|model"):
            copy.load_model()
        path.write_bytes(whole)
    copy.load_model()


@pytest.mark.parametrize("key", ["model.head.weight", "optimizer.blocks.0.mixer.query.weight|momentum"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int32])
def test_another_dtype_is_noticed(copy, refused, key, dtype):
    path = max(copy.path.glob("checkpoint-*-part-*"), key=lambda path: int(path.name.split("-")[1]))
    tensors, meta = checkpoint.load(path)
    key = (
        key
        if key in tensors
        else next(name for name in tensors if name.startswith(key.split("|")[0] + "|") and "step" not in name)
    )
    checkpoint.save(path, {**tensors, key: tensors[key].to(dtype)}, meta)
    before = content(copy.path)
    assert str(dtype) in refused("train", "--resume", copy.path, "train.steps=20", "-q")
    assert content(copy.path) == before


def test_a_new_run_begins_with_weights_of_another(text, tmp_path, ended, refused):
    weights = checkpoint.load(ended.model_file)[0]
    for path in (ended.path, ended.model_file, ended.path / "checkpoint.json"):
        config = small(text, tmp_path, train__steps=1, train__seed=5)
        config.optimizer.lr = config.optimizer.rest.lr = 0.0
        run = train(config, init_from=path, quiet=True).run
        found = checkpoint.load(run.model_file)[0]
        assert all(torch.equal(found[name], weights[name]) for name in weights)
    out = tmp_path / "line"
    small_data = [f"data.path={text}", "data.window=16", "train.steps=1", f"train.out={out}", "train.device=cpu", "-q"]
    assert (
        main(["train", "--init-from", str(ended.path), *small_data, "train.final_bytes=100", "train.sample_bytes=2"])
        == 0
    )
    assert Run(out / "001").config().model == ended.config().model
    said = refused("train", "--init-from", ended.model_file, *small_data)
    assert "model.safetensors: " in said
    assert "another model" in said
    said = refused("train", "--init-from", text, *small_data)
    assert "words.txt: cannot be read" in said
    assert "nowhere: there is no" in refused("train", "--init-from", tmp_path / "nowhere", *small_data)
    with pytest.raises(ConfigError, match="resume, or init_from"):
        train(resume=ended.path, init_from=ended.path, quiet=True)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"train__seed": 3}, "train.seed"),
        ({"train__dtype": "bfloat16"}, "train.dtype"),
        ({"data__window": 8}, "data.window"),
        ({"data__batch": 2}, "data.batch"),
    ],
)
def test_what_would_change_a_run_is_refused(text, copy, tmp_path, change, key):
    before = content(copy.path)
    with pytest.raises(ConfigError, match=rf"^{key}: .* is not allowed; the run was saved with"):
        train(small(text, tmp_path, train__steps=20, **change), resume=copy.path, quiet=True)
    assert content(copy.path) == before


def test_another_text_is_refused_or_meant(copy, tmp_path, refused):
    other = tmp_path / "other.txt"
    other.write_text("clocks forget what levels remember; " * 200)
    before = content(copy.path)
    given = ["train", "--resume", copy.path, "-q", "--data", other, "train.seed=9", "train.steps=15"]
    assert "data.path" in refused(*given)
    config = copy.config()
    config.data.path, config.train.steps = str(other), 15
    with pytest.raises(CheckpointError, match=r"text other\.txt is not the one"):
        train(config, resume=copy.path, quiet=True)
    assert content(copy.path) == before
    assert main([*map(str, given), "--reset-data"]) == 0
    now = copy.config()
    assert (now.data.path, now.train.seed) == (str(other), 9)
    with ShardReader(copy.path) as parts:
        assert parts.meta["step"] == 15
        assert parts.meta["data"]["step"] == 3
    assert main(["train", "--resume", str(copy.path), "-q", "train.steps=16"]) == 0


def test_a_run_that_is_stopped_before_its_first_step_goes_on(text, tmp_path, monkeypatch):
    whole = train(small(text, tmp_path / "whole"), quiet=True).run
    begin = training.Report.begin

    def stopped(self, *args):
        signal.raise_signal(signal.SIGTERM)
        begin(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(training.Report, "begin", stopped)
        result = train(small(text, tmp_path / "parts"), quiet=True)
    assert (result.finished, result.step) == (False, 0)
    assert same_ends(train(resume=result.run.path, quiet=True).run, whole)
    bare = Run.create(small(text, tmp_path / "bare"))  # killed when there was nothing but this
    assert same_ends(train(resume=bare.path, quiet=True).run, whole)


def test_measuring_is_no_training_and_something_is_to_be_seen_early(text, tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(training.time, "monotonic", lambda: clock[0])
    update, evaluate = Training._update, Training._evaluate

    def a_second(self):
        clock[0] += 1
        return update(self)

    def an_hour(self, held_out):
        clock[0] += 3600
        return evaluate(self, held_out)

    monkeypatch.setattr(Training, "_update", a_second)
    monkeypatch.setattr(Training, "_evaluate", an_hour)
    config = small(text, tmp_path, train__steps=10**6, train__seconds=30.0, train__eval_every=10)
    result = train(config, quiet=True)
    assert (result.step, result.seconds) == (30, 30.0)

    seen = []
    monkeypatch.setattr(
        Training, "_update", lambda self: (seen.append(sorted(content(self.run.path))), a_second(self))[1]
    )
    train(small(text, tmp_path, train__steps=62, train__eval_every=0, train__save_every=1000), quiet=True)
    early = {"checkpoint.json", "loss.png", "samples.txt"}
    assert not early & set(seen[59])
    assert early <= set(seen[60])


def test_a_bar_is_shown_for_all_that_is_long(text, tmp_path, capfd):
    assert train(small(text, tmp_path)).finished
    shown = capfd.readouterr().err
    for word in ("measuring", "writing", "step"):
        assert word in shown


def test_a_score_that_is_no_number_is_not_the_best():
    from nestopt.train.checkpoints.index import Index, Kept, after

    index: Index | None = None
    for number, score in enumerate([float("nan"), 2.0, 1.0, None, float("nan")], start=1):
        index = after(index, Kept(number, 1, score), {}, 1)
    assert index is not None
    assert [item.number for item in index.kept] == [3, 5]
    assert index.stale == [*Kept(4, 1).files, Kept(4, 1).index]
