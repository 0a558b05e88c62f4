"""Two processes train as one does: the same losses under DDP and DeepSpeed's ZeRO 0, 1 and 2."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nestopt.config import Config
from nestopt.train import checkpoint
from nestopt.train.loop import train
from nestopt.train.metrics import read

pytestmark = pytest.mark.distributed

STACKS = {
    "elementwise": {
        "level": "parallel",
        "levels": {"fast": "adam", "slow": {"level": "momentum", "period": 3, "dampening": 0.9}},
    },
    "matrices": {"level": "muon", "dtype": "float32"},  # not bfloat16, which would round away what is compared
}
SAME = [
    ("elementwise", "ddp", 0),
    ("matrices", "ddp", 0),
    ("elementwise", "deepspeed", 0),
    ("matrices", "deepspeed", 0),
    ("elementwise", "deepspeed", 1),
    ("elementwise", "deepspeed", 2),
]
RESUMED = [("ddp", 0), ("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2)]
REFUSED = {
    "zero 1": ({"engine": "deepspeed", "zero_stage": 1}, ["train.zero_stage", "muon", "matrices", "flat slices"]),
    "zero 2": ({"engine": "deepspeed", "zero_stage": 2}, ["train.zero_stage", "muon", "matrices", "flat slices"]),
    "single": ({"engine": "single"}, ["train.engine", "2 processes were started"]),
    "bfloat16": ({"engine": "deepspeed", "dtype": "bfloat16"}, ["train.dtype", "float32"]),
}


def torchrun(*command):
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *map(str, command)],
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A run of a few seconds on text of its own."""
    folder = tmp_path_factory.mktemp("distributed")
    text = folder / "words.txt"
    text.write_text("levels remember gradients and tokens alike. " * 400)

    def make(stack, **train_section):
        return {
            "model": {"dim": 16, "blocks": 1, "heads": 2, "mlp": {"level": "cms", "periods": [1, 2]}},
            "optimizer": {"stack": STACKS[stack], "lr": 0.01, "weight_decay": 0.1},
            "data": {"path": str(text), "window": 24, "batch": 8},
            "train": {
                "steps": 12,
                "log_every": 1,
                "eval_every": 5,
                "eval_bytes": 400,
                "final_bytes": 400,
                "save_every": 0,
                "sample_bytes": 8,
                "clip": 0.5,
                "device": "cpu",
                "threads": 1,
                "out": str(folder / "runs"),
                **train_section,
            },
        }

    return make


def measured(records):
    """All losses, in their order."""
    return [line[key] for line in records for key in ("train/loss", "eval/bits_per_byte") if key in line]


@pytest.fixture(scope="module")
def together(data, tmp_path_factory):
    """All trainings of two processes, in one start of them: how each ended, by case."""
    jobs, cases = [], []

    def add(case, job, resume=None):
        cases.append(case)
        jobs.append([job, resume])

    for stack, engine, stage in SAME:
        add(("same", stack, engine, stage), data(stack, engine=engine, zero_stage=stage))
    for case, (section, _) in REFUSED.items():
        add(("refused", case), data("matrices", **section))
    uneven = copy.deepcopy(data("elementwise", engine="ddp"))
    uneven["data"]["batch"] = 7
    add(("refused", "batch"), uneven)
    for engine, stage in RESUMED:
        out = tmp_path_factory.mktemp("resumed")
        section = {"engine": engine, "zero_stage": stage, "out": str(out), "save_every": 8}
        add(("whole", engine, stage), data("elementwise", **section))
        # its last checkpoint is in the middle of a period, four steps before the end: go on from there once more
        add(("again", engine, stage), None, str(out / "001"))
    # the last of those folders holds slices of ZeRO 2: another stack and another model can't take them
    for case, changes in {"stack": {"stack": "adam"}, "model": {"dim": 32}}.items():
        other = copy.deepcopy(data("elementwise", engine="deepspeed", zero_stage=2))
        other["optimizer" if case == "stack" else "model"].update(changes)
        add(("other", case), other, str(out / "001"))
    short = {"seconds": 2.0, "steps": 100_000, "eval_every": 3, "save_every": 4}
    add(("timed",), data("elementwise", engine="ddp", **short))
    path = tmp_path_factory.mktemp("jobs") / "jobs.json"
    path.write_text(json.dumps(jobs))
    status, output = torchrun(Path(__file__).with_name("driver.py"), path)
    assert status == 0, output
    return dict(zip(cases, json.loads(path.with_suffix(".done").read_text()), strict=True))


@pytest.fixture(scope="module")
def alone(data):
    """What one process measures."""
    runs = {stack: train(Config.from_data(data(stack)), quiet=True).run for stack in STACKS}
    found = {stack: measured(read(run.metrics_file)) for stack, run in runs.items()}
    assert all(len(values) == 12 + 3 for values in found.values())
    return found


@pytest.mark.parametrize(("stack", "engine", "stage"), SAME)
def test_two_processes_train_as_one(together, alone, stack, engine, stage):
    assert measured(together["same", stack, engine, stage]["records"]) == pytest.approx(alone[stack], rel=1e-5)


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_something_else_is_refused(together, case):
    for word in REFUSED[case][1]:
        assert word in together["refused", case]["refused"]


def test_a_batch_that_does_not_divide_is_refused(together):
    for word in ("data.batch", "7", "multiple of the 2 processes"):
        assert word in together["refused", "batch"]["refused"]


@pytest.mark.parametrize(("engine", "stage"), RESUMED)
def test_a_run_resumes_exactly(together, engine, stage):
    """From a checkpoint in the middle of a period: the same losses, bit for bit, as the run that went through."""
    whole, again = together["whole", engine, stage], together["again", engine, stage]
    assert again["folder"] == whole["folder"]
    assert measured(again["records"]) == measured(whole["records"])
    # the last four steps were really taken twice
    seconds = [[line["seconds"] for line in run["records"] if line["step"] == 12] for run in (whole, again)]
    assert seconds[0] != seconds[1]


@pytest.mark.parametrize("case", ["stack", "model"])
def test_slices_of_something_else_are_refused(together, case):
    assert f"of another {'optimizer' if case == 'stack' else 'model'}" in together["other", case]["refused"]


def test_processes_that_are_limited_by_time_act_alike(together):
    """Each has its own clock; if one evaluated, saved or ended where the other did not, both would wait for ever."""
    records = together["timed",]["records"]
    assert 0 < records[-1]["step"] < 100_000
    assert "eval/bits_per_byte" in records[-1]


def test_the_command_of_the_documentation(data, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(Config.from_data(data("elementwise", out=str(tmp_path))).to_yaml())
    status, output = torchrun("-m", "nestopt", "train", path, "train.engine=deepspeed", "train.zero_stage=2")
    assert status == 0, output
    assert "this model" in output
    weights, _ = checkpoint.load(tmp_path / "001" / "model.safetensors")
    assert all(torch.isfinite(value).all() for value in weights.values())
