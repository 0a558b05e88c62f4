"""A process that fails ends all, at once and in words; those that disagree do not begin; NaN is in no file."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nestopt.config import Config
from nestopt.train.checkpoints import file as checkpoint
from nestopt.train.checkpoints.shards import ShardReader
from nestopt.train.report.metrics import read
from tests.distributed.settings import ENGINES, STEPS, run

pytestmark = pytest.mark.distributed

FAILING = Path(__file__).parent / "failing.py"
WITHIN = 15.0
"""Seconds in which all must have ended once one has failed."""

LAUNCHERS = ("plain", "torchrun")


class Job:
    """Two processes, of which one fails."""

    def __init__(
        self, path: Path, text: str, launcher: str, engine: str, fault: str, *given: str, call: str = "5"
    ) -> None:
        kind, _, rank = fault.rpartition("@")
        settings = run("transformer", text, str(path / "runs"), eval_every=6, save_every=2, **ENGINES[engine])
        (path / "config.yaml").write_text(Config.from_data(settings).to_yaml())
        given = given or (str(path / "config.yaml"),)
        command = [str(FAILING), kind, rank or "0", call, "train", *given, "-q"]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONUNBUFFERED": "1"}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        alone = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        if launcher == "torchrun":
            torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *command]
            starts = [(torchrun, env)]
        else:
            starts = [
                ([sys.executable, *command], {**env, **alone, "RANK": str(i), "LOCAL_RANK": str(i)}) for i in range(2)
            ]
        self.folder, self.said = path / "runs" / "001", path / "said.txt"
        with open(self.said, "w") as said:
            begun = [subprocess.Popen(c, env=e, stdout=said, stderr=subprocess.STDOUT) for c, e in starts]
        try:
            deadline, first = time.monotonic() + 120, None
            while any(process.poll() is None for process in begun):
                assert time.monotonic() < deadline, self.text
                time.sleep(0.02)
                if first is None and any(process.poll() is not None for process in begun):
                    first = time.time()
            last = time.time()
        finally:
            for process in begun:
                process.kill()
                process.wait()
        self.seconds = last - (self._failed_at() or first or last)
        self.status = [process.returncode for process in begun]

    def _failed_at(self) -> float | None:
        """The time at which the fault came, as the process that has it says."""
        found = re.search(r"^FAULT AT ([0-9.]+)$", self.text, re.MULTILINE)
        return float(found[1]) if found else None

    @property
    def text(self) -> str:
        return self.said.read_text()

    def check(self, *words: str, status: tuple[int, ...] = (1,)) -> None:
        print(f"all have ended {self.seconds:.1f} s after it")  # -s: the worst case of docs/reliability.md
        assert 0 not in self.status, self.text
        if len(self.status) == 2:
            assert set(self.status) <= set(status), (self.status, self.text)
        assert self.seconds < WITHIN, self.text
        for word in words:
            assert word in self.text, self.text

    def check_files(self) -> None:
        """What is saved is finite, if there is anything."""
        if (self.folder / "checkpoint.json").exists():
            with ShardReader(self.folder) as parts:
                for key in parts.keys():  # noqa: SIM118
                    assert parts.whole(key).float().isfinite().all(), key
        assert not (self.folder / "model.safetensors").exists()


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("rank", [0, 1])
def test_an_exception_ends_all(text, tmp_path, engine, launcher, rank):
    where = "raise:step" if engine in ("ddp", "zero 1", "zero 3") else "backward:step"
    job = Job(tmp_path, text, launcher, engine, f"{where}@{rank}")
    job.check("ValueError: broken on purpose", *([f"process {rank} of 2 failed"] if launcher == "plain" else []))
    job.check_files()


@pytest.mark.parametrize("place", ["data", "save", "evaluate", "build", "optimizer", "sample"])
@pytest.mark.parametrize(("engine", "rank"), [("ddp", 0), ("fsdp2", 1)])
def test_it_does_so_wherever_it_comes(text, tmp_path, engine, rank, place):
    if (place, engine) == ("save", "ddp"):
        rank = 0  # which alone writes there
    job = Job(tmp_path, text, "plain", engine, f"raise:{place}@{rank}", call="1")
    job.check(f"process {rank} of 2 failed: ValueError: broken on purpose")
    job.check_files()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_killed_ends_all(text, tmp_path, engine, rank):
    job = Job(tmp_path, text, "plain", engine, f"SIGKILL:step@{rank}")
    job.check(f"process {rank} of 2 failed: it ended without a word", status=(-9, 1))
    job.check_files()


def test_torchrun_ends_too_where_one_is_killed(text, tmp_path):
    Job(tmp_path, text, "torchrun", "fsdp2", "SIGKILL:step@1").check()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_process_that_is_asked_to_stop_stops_all_and_the_run_is_saved(text, tmp_path, engine):
    job = Job(tmp_path, text, "plain", engine, "SIGTERM:step@1")
    job.check(status=(130,))
    with ShardReader(job.folder) as parts:
        assert parts.meta["step"] == 5


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_refuses_its_config_ends_all(text, tmp_path, engine, rank):
    job = Job(tmp_path, text, "plain", engine, "", str(tmp_path / "config.yaml"), f"{rank}:train.sede=4")
    job.check("has no key 'sede'", f"process {rank} of 2 failed: ConfigError", status=(1, 2))


# -- what is not finite ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("fault", "what"), [("nan", "the loss"), ("gradient", "the gradient of norm.weight")])
def test_what_is_not_finite_stops_the_run_before_it_is_in_a_weight(text, tmp_path, engine, fault, what):
    job = Job(tmp_path, text, "plain", engine, f"{fault}:step@1")
    job.check(f"step 5: {what} is not finite in process 1;")
    job.check_files()
    with ShardReader(job.folder) as parts:
        assert parts.meta["step"] == 4


@pytest.mark.parametrize("engine", ENGINES)
def test_skipped_steps_are_none_to_any_process(text, tmp_path, engine):
    """Two engines agree on what comes after; the weights are those of a run in which the steps were no steps."""
    config = str(tmp_path / "config.yaml")
    job = Job(tmp_path, text, "plain", engine, "nan:step@1", config, "train.on_nonfinite=skip", call="5,6,9")
    assert job.status == [0, 0], job.text
    assert job.text.count("it is skipped") == 3
    records = [line for line in read(job.folder / "metrics.jsonl") if "train/skipped" in line]
    assert [line["train/skipped"] for line in records] == [0] * 4 + [1, 2, 2, 2] + [3] * 4
    weights, _ = checkpoint.load(job.folder / "model.safetensors")
    wanted = without_steps(text, tmp_path / "alone", {4, 5, 8})
    for name, value in wanted.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=2e-5, msg=name)
    with ShardReader(job.folder) as parts:
        assert parts.meta["skipped"] == [3, 0]


def without_steps(text, out, skipped):
    """The weights of one process to evaluate with, whose optimizer takes no step at some."""
    from nestopt.train import engines
    from nestopt.train.training import Training

    config = Config.from_data(run("transformer", text, str(out)))
    training = Training(config, engines.make(config), None, True)
    for step in range(STEPS):
        training.optimizer.skipping = step in skipped
        training._update()
        training.step += 1
    with training.engine.evaluating():
        return {name: param.clone() for name, param in training.lm.named_parameters()}


def test_a_run_stops_that_skips_too_many_in_a_row(text, tmp_path):
    given = [str(tmp_path / "config.yaml"), "train.on_nonfinite=skip", "train.steps=40"]
    calls = ",".join(map(str, range(5, 40)))
    job = Job(tmp_path, text, "plain", "ddp", "nan:step@1", *given, call=calls)
    job.check("step 15: the loss is not finite in process 1, and so were the 10 steps before it")
    job.check_files()


# -- what differs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["1:train.seed=3"], ["train.seed: process 0 has 0, process 1 has 3"]),
        (
            ["1:optimizer.lr=0.5", "0:train.steps=9"],
            ["optimizer.lr: ", "train.steps: process 0 has 9, process 1 has 12"],
        ),
        (["0:data.batch=4"], ["data.batch: process 0 has 4, process 1 has 8"]),
        (["1:model.dim=32"], ["model.dim: process 0 has 16, process 1 has 32"]),
    ],
)
def test_processes_that_disagree_do_not_begin(text, tmp_path, engine, given, words):
    job = Job(tmp_path, text, "plain", engine, "", str(tmp_path / "config.yaml"), *given)
    job.check(*words, status=(2,))
    assert not job.folder.exists()


@pytest.mark.parametrize(
    ("fault", "word"),
    [
        ("torch", "torch: process 0 has "),
        ("nestopt", "nestopt: process 0 has "),
        ("plugin", "plugin failing: process 0 has nothing, process 1 has "),
        ("text", "the digest of the text: process 0 has "),
        ("engine", "train.engine: process 0 has 'ddp', process 1 has 'fsdp2'"),
    ],
)
def test_versions_plugins_text_and_engine_are_among_it(text, tmp_path, fault, word):
    given = [str(tmp_path / "config.yaml"), *(["1:train.engine=fsdp2"] if fault == "engine" else [])]
    job = Job(tmp_path, text, "plain", "ddp", f"differ-{fault}@1", *given)
    job.check(word, status=(2,))
    assert not job.folder.exists()
