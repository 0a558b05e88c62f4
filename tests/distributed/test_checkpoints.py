"""What any engine saved, any engine takes up: with the same numbers, to the same end."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nestopt.config import Config
from nestopt.train.checkpoints.shards import ShardReader
from nestopt.train.errors import CheckpointError
from nestopt.train.loop import train
from nestopt.train.report.metrics import read
from nestopt.train.run import Run
from tests.distributed.conftest import saves, torchrun
from tests.distributed.settings import ENGINES, SAVED, STEPS, run

pytestmark = pytest.mark.distributed

SAVES = [(name, world) for world in (1, 2) for name in ENGINES]


def whole(folder):
    """A checkpoint's tensors, but for the generators' states, of which each process has its own."""
    with ShardReader(folder) as parts:
        return {key: parts.whole(key) for key in parts.keys() if not key.startswith("random.")}  # noqa: SIM118


def losses(records):
    return [line["train/loss"] for line in records if "train/loss" in line]


@pytest.fixture(scope="module")
def saved(ends, out):
    return {key: whole(path) for key, path in saves(out).items()}


@pytest.fixture(scope="module")
def alone(text, out):
    return losses(read(train(Config.from_data(run("hope", text, str(out / "uncut"))), quiet=True).run.metrics_file))


def taken_up(ends, name, world):
    """By whom, of what: the losses afterwards, and the copy that was made at once."""
    for case, end in ends.items():
        if case[0] == "resumed" and case[1:3] == (name, world):
            yield from zip(case[3], end["gave"], itertools.count(), itertools.repeat(case[3]), strict=False)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", ENGINES)
def test_every_engine_takes_up_what_any_has_saved(ends, saved, alone, out, name, world):
    seen = set()
    for key, after, number, together in taken_up(ends, name, world):
        seen.add(key)
        of = sorted({w for _, w in together})
        copy = whole(out / f"copies-{name}-{world}-of-{of}" / str(number))
        assert copy.keys() == saved[key].keys()
        for tensor, value in saved[key].items():
            assert torch.equal(copy[tensor], value), (key, tensor)
        assert len(after) == STEPS - SAVED
        assert after == pytest.approx(alone[SAVED:], rel=1e-5), key
    assert seen == set(SAVES)


@pytest.mark.parametrize("key", SAVES, ids=str)
def test_all_save_the_same_names_and_shapes(saved, key):
    first = saved["ddp", 1]
    assert {name: value.shape for name, value in saved[key].items()} == {n: v.shape for n, v in first.items()}
    weight = "blocks.0.mixer.query.weight"
    assert first[f"model.{weight}"].shape == (16, 16)
    assert float(first[f"optimizer.{weight}|step"]) == SAVED
    assert sum(value.shape == (16, 16) for name, value in first.items() if name.startswith(f"optimizer.{weight}|")) >= 3


@pytest.mark.parametrize("key", SAVES, ids=str)
def test_a_run_leaves_its_checkpoint_and_one_file_of_weights(ends, out, key):
    """The parts are of the save that was gone back to; the weights are of the end, in one file, by any engine."""
    run_folder = Run(Path(saves(out)[key]))
    number = ShardReader.number_in(run_folder.path)
    parts = key[1] if key[0] not in ("ddp", "zero 0") else 1
    found = sorted(path.name for path in run_folder.path.glob("checkpoint*"))
    names = [f"checkpoint-{number}-part-{i + 1}-of-{parts}.safetensors" for i in range(parts)]
    assert found == sorted([*names, "checkpoint.json"])
    assert not list(run_folder.path.glob(".*"))
    model = run_folder.load_model()
    other = Run(Path(saves(out)["ddp", 1])).load_model()
    for (name, value), (_, same) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(value, same, rtol=1e-3, atol=1e-5, msg=name)
    assert model.head.weight is model.embedding.weight


def test_a_checkpoint_of_another_model_is_refused_before_anything_changes(ends, text, out):
    folder = saves(out)["zero 3", 2]
    other = run("hope", text, str(out))
    other["model"] = {**other["model"], "dim": 32}
    with pytest.raises(CheckpointError, match=r"another model: .* differs"):
        train(Config.from_data(other), resume=folder, quiet=True)
    other = run("hope", text, str(out))
    other["optimizer"] = {**other["optimizer"], "stack": "adam"}
    with pytest.raises(CheckpointError, match="another optimizer"):
        train(Config.from_data(other), resume=folder, quiet=True)


def test_a_missing_part_is_named(ends, out, tmp_path):
    folder = Path(saves(out)["zero 2", 2])
    for path in folder.glob("checkpoint*"):
        if "part-2" not in path.name:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(CheckpointError, match=r"checkpoint-\d-part-2-of-2.safetensors: this part .* missing"):
        ShardReader(tmp_path)


def killed(folder, command, after, delay):
    """Start a run, and kill all its processes `delay` seconds after it has saved `after` times."""
    import psutil  # with DeepSpeed

    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
    )
    deadline = time.monotonic() + 200
    while ShardReader.number_in(folder) < after:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(delay)
    # torchrun's processes are in sessions of their own, and would live on
    everyone = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for one in everyone:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    psutil.wait_procs(everyone)
    process.wait()
    process.stdout.close()
    with ShardReader(folder) as parts:
        return parts.meta["step"]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_run_that_is_killed_goes_on_on_another_stage_and_with_other_processes(text, tmp_path, seed):
    """kill -9, at any moment, of a run that saves at every step; twice, and then to its end in one process."""
    delays = random.Random(seed)
    config = run("hope", text, str(tmp_path), save_every=1, eval_every=0, **ENGINES["zero 2"])
    config["train"]["steps"] = 300
    path, folder = tmp_path / "config.yaml", tmp_path / "001"
    path.write_text(Config.from_data(config).to_yaml())
    start = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "nestopt",
        "train",
    ]
    first = killed(folder, [*start, str(path), "-q"], 3, delays.uniform(0, 1))
    again = [*start, "--resume", str(folder), "-q", "train.zero_stage=1"]
    number = ShardReader.number_in(folder)
    second = killed(folder, again, number + 3, delays.uniform(0, 1))
    assert second > first
    settled = Run(folder).config()
    settled.train.zero_stage = None
    settled.train.engine = "single"
    settled.train.save_every = 0
    settled.train.steps = 300
    # the schedule is that of 300 steps; a few more are enough to see
    alone = Config.from_data({**config, "train": {**config["train"], "engine": "single", "zero_stage": None}})
    alone.train.save_every, alone.train.out = 0, str(tmp_path / "alone")
    ours = continued(settled, folder, second + 4)
    assert ours == pytest.approx(continued(alone, None, second + 4)[second:], rel=1e-4)


def continued(config, folder, last):
    """The losses up to a step."""
    from nestopt.train import engines
    from nestopt.train.training import Training

    training = Training(config, engines.make(config), None if folder is None else Run(folder), True)
    found = []
    while training.step < last:
        found.append(float(training._update()[0]))
        training.step += 1
    return found


def test_torchrun_resumes_by_the_command_line(ends, text, out, tmp_path):
    folder = Path(saves(out)["fsdp2", 1])
    copy = tmp_path / "001"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    status, output = torchrun(2, "-m", "nestopt", "train", "--resume", copy, "-q", "train.engine=ddp")
    assert status == 0, output
    assert losses(read(copy / "metrics.jsonl")) == pytest.approx(losses(read(folder / "metrics.jsonl")), rel=1e-5)
