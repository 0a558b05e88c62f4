"""Disks that are full, folders that others use or take away, and a run that is killed."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nestopt.cli import main
from nestopt.config import ConfigError
from nestopt.train.checkpoints.shards import ShardReader
from nestopt.train.errors import CheckpointError
from nestopt.train.loop import train
from nestopt.train.run import Run
from nestopt.train.training import Training
from tests.train.folders.small import content, same_ends, small


def after(step: int, do: Callable[[Run], Any], patch: pytest.MonkeyPatch) -> None:
    """Have something happen to a run's folder once it has taken so many steps."""
    update = Training._update

    def changed(self):
        if self.step == step:
            do(self.run)
        return update(self)

    patch.setattr(Training, "_update", changed)


def start(*args: object, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "nestopt", "train", *map(str, args), "-q"]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)


def test_two_runs_do_not_write_to_one_folder(text, copy, tmp_path, monkeypatch):
    config = copy.config()
    config.train.steps = 20
    seen = []

    def second(run: Run) -> None:
        before = content(run.path)
        with start("--resume", run.path, "train.steps=30") as other:
            said = other.stderr.read()
        seen.append((other.returncode, said, content(run.path) == before))

    after(14, second, monkeypatch)
    assert train(config, resume=copy.path, quiet=True).finished
    ((status, said, same),) = seen
    assert status == 2
    assert said.count("\n") == 1
    assert f"{copy.path}: another run is writing to this folder" in said
    assert same
    config.train.steps = 22
    assert train(config, resume=copy.path, quiet=True).finished  # the first has let it go


def test_a_killed_run_leaves_no_lock(text, tmp_path):
    config = small(text, tmp_path, train__steps=10**6, train__save_every=1, train__eval_every=0)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    with start(tmp_path / "config.yaml") as process:
        wait_for(process, (tmp_path / "001" / "checkpoint.json").exists)
        process.kill()
    with ShardReader(tmp_path / "001") as parts:
        config.train.steps = parts.meta["step"] + 1
    assert train(config, resume=tmp_path / "001", quiet=True).finished


@pytest.mark.parametrize("how", ["removed", "moved", "replaced", "config removed"])
@pytest.mark.parametrize("log_every", [1, 100])
def test_a_folder_that_is_taken_away_does_not_come_back(text, tmp_path, how, log_every, monkeypatch):
    def away(run: Run) -> None:
        if how == "config removed":
            run.config_file.unlink()
        elif how == "removed":
            shutil.rmtree(run.path)
        else:
            run.path.rename(tmp_path / "moved")
            if how == "replaced":
                shutil.copytree(tmp_path / "moved", run.path)

    after(6, away, monkeypatch)
    with pytest.raises(CheckpointError, match=r"001: the run's folder was removed or replaced"):
        train(small(text, tmp_path, train__log_every=log_every), quiet=True)
    assert (tmp_path / "001").exists() == (how in ("replaced", "config removed"))
    if how == "replaced":
        assert content(tmp_path / "001") == content(tmp_path / "moved")


LIMITS = [4000, *(pytest.param(limit, marks=pytest.mark.slow) for limit in (100, 300, 1000, 20_000, 60_000, 200_000))]


@pytest.mark.parametrize("limit", LIMITS)
def test_a_full_disk_stops_a_run_in_a_sentence_and_its_checkpoint_stays(copy, limit):
    """No file may become larger than the limit, which the system refuses as it does where no space is left."""
    with ShardReader(copy.path) as parts:
        before = {name: (copy.path / name).read_bytes() for name in [*parts.files, "model.safetensors"]}
        assert parts.meta["step"] == 12

    def limited() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    with start("--resume", copy.path, "train.steps=2000", preexec_fn=limited) as process:
        said = process.stderr.read()
    assert process.returncode == 2, said
    assert said.count("\n") == 1, said
    assert said.startswith(f"nestopt: {copy.path}/")
    assert "File too large" in said
    assert not list(copy.path.glob(".*"))
    with ShardReader(copy.path) as parts:
        step = parts.meta["step"]
        if step == 12:
            assert all((copy.path / name).read_bytes() == data for name, data in before.items())
    config = copy.config()
    config.train.steps = step + 2
    assert train(config, resume=copy.path, quiet=True).finished


@pytest.mark.parametrize("way", ["{}", "{}/below", "{}/a/b"])
def test_a_file_in_the_way_of_a_folder(text, tmp_path, refused, way):
    (tmp_path / "file").write_text("mine")
    where = way.format(tmp_path / "file")
    said = refused("train", f"data.path={text}", "--out", where, "-q", "train.device=cpu")
    assert where in said
    assert "a file is in its way" in said
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_that_cannot_be_written(text, ended, refused):
    said = refused("train", f"data.path={text}", "--out", "/proc/nowhere", "-q", "train.device=cpu")
    assert "/proc/nowhere" in said
    assert "/proc" in refused("generate", ended.path, "--length", "1", "--state", "/proc/state")


def test_a_place_for_a_state_is_looked_for_first(ended, tmp_path, refused, monkeypatch, capsys):
    monkeypatch.setattr(Run, "load_model", None)
    assert "--state: " in refused("generate", ended.path, "--state", tmp_path)
    assert "is no folder" in refused("generate", ended.path, "--state", tmp_path / "none" / "x")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    assert "it is a link" in refused("generate", ended.path, "--state", tmp_path / "link")
    for seed in (2**64, -1):
        with pytest.raises(SystemExit):
            main(["generate", str(ended.path), "--seed", str(seed)])
        assert f"argument --seed: '{seed}' is not allowed; give a whole number, 0 to" in capsys.readouterr().err


def test_numbers_that_cannot_be_are_refused_before_there_is_a_run(text, tmp_path, refused):
    given = ["train", "--data", text, "--out", tmp_path / "runs", "-q", "train.device=cpu"]
    assert f"give {2**64 - 1} or less" in refused(*given, f"train.seed={2**64}")
    said = refused(*given, "data.window=8800")
    assert "data.window: 8800 is not allowed; words.txt has " in said
    assert not (tmp_path / "runs").exists()


def test_an_error_while_it_is_taken_up_changes_nothing(copy, text):
    before = content(copy.path)
    config = copy.config()
    config.train.steps, config.data.window = 20, 10**6
    with pytest.raises(ConfigError, match=r"data\.window"):
        train(config, resume=copy.path, quiet=True)
    assert content(copy.path) == before


def test_a_checkpoint_is_read_while_a_run_writes_the_next(text, tmp_path, monkeypatch):
    from nestopt.train.checkpoints import shards

    config = small(text, tmp_path, train__steps=3, train__save_every=1, train__eval_every=0)
    run = train(config, quiet=True).run
    opened, config.train.steps = shards._opened, 5

    def late(path: Path) -> Any:
        monkeypatch.setattr(shards, "_opened", opened)
        train(config, resume=run.path, quiet=True)
        return opened(path)

    monkeypatch.setattr(shards, "_opened", late)
    with ShardReader(run.path) as parts:
        assert parts.meta["step"] == 5


@pytest.mark.parametrize("line", ["{", "[]", '{"step": "x"}', "[" * 100_000, '{"step": null}'])
def test_damaged_metrics_are_named(copy, refused, line):
    copy.metrics_file.write_text(copy.metrics_file.read_text() + line + "\n")
    before = content(copy.path)
    assert "metrics.jsonl: is damaged" in refused("train", "--resume", copy.path, "-q", "train.steps=20")
    assert content(copy.path) == before


def wait_for(process: subprocess.Popen[str], ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not ready():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)


KILLED = """
import json, os, signal, sys, threading
from pathlib import Path
from nestopt.cli import main
from nestopt.config import load
from nestopt.train.loop import train
config, folder, moments = load(sys.argv[1]), Path(sys.argv[2]), map(float, sys.argv[3:])
for moment in moments:
    child = os.fork()
    if not child:
        threading.Timer(moment, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
        train(config, resume=folder if folder.exists() else None, quiet=True)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if not os.WIFSIGNALED(status):
        break
    index = folder / "checkpoint.json"
    print(json.loads(index.read_text())["meta"]["step"] if index.exists() else "none", flush=True)
"""


@pytest.mark.parametrize("times", [5, pytest.param(50, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_at_any_moment_ends_as_if_it_was_not(text, tmp_path, times):
    """By kill -9, again and again until it has ended; the moments are spread over all that a run does."""
    config = small(text, tmp_path / "whole", train__steps=60, train__eval_every=5, train__save_every=1, train__keep=2)
    whole = train(config, quiet=True)
    config.train.out = str(tmp_path / "killed")
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    chance = random.Random(0)
    done, killed = 0, []
    while len(killed) < times:
        folder = tmp_path / "killed" / f"{done + 1:03d}"
        moments = [f"{chance.uniform(0.0, 2.5):.4f}" for _ in range(times - len(killed))] + ["3600"]
        command = [sys.executable, "-c", KILLED, str(tmp_path / "config.yaml"), str(folder), *moments]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        assert found.returncode == 0, found.stderr
        assert "Error" not in found.stderr, found.stderr
        killed += found.stdout.split()
        assert same_ends(Run(folder), whole.run)
        assert not list(folder.glob(".*"))
        done += 1
    print(f"{len(killed)} kills in {done} runs, whose checkpoints were then of the steps {' '.join(killed)}")
    assert os.listdir(tmp_path / "killed")
