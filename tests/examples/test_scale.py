"""The configurations at scale: each loads, is the model that it says, and fits its machine."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import nestopt
from nestopt.config import Config
from nestopt.config.sizes import NAMES
from nestopt.models.build import build_model
from nestopt.optim import optimizer
from nestopt.train.data.builtin import FinewebEdu
from nestopt.train.engines.deepspeed_settings import merged, read, stage_of

FOLDER = Path(__file__).parents[2] / "examples" / "scale"
TOKENS = {"340m": 15e9, "760m": 30e9, "1.3b": 100e9}


def config(name: str, *overrides: str) -> Config:
    found = nestopt.load(FOLDER / f"{name.partition('-')[2]}.yaml", [f"model={name}", *overrides])
    assert isinstance(found, Config)
    return found


@pytest.mark.parametrize("name", NAMES)
def test_every_model_is_of_its_size_and_trained_as_its_file_says(name: str) -> None:
    size = name.partition("-")[2]
    run = config(name)
    with torch.device("meta"):
        model = build_model(run.model)
    count = sum(p.numel() for p in model.parameters())
    assert count == pytest.approx(float(size[:-1]) * {"m": 1e6, "b": 1e9}[size[-1]], rel=0.03)
    assert run.train.steps * run.data.batch * run.data.window == pytest.approx(TOKENS[size], rel=1e-3)
    assert run.data.dataset == FinewebEdu()
    assert run.model.vocab == 32000
    nested = optimizer(model, run)
    decays = {nested.level(group).weight_decay for group in nested.param_groups}  # type: ignore[attr-defined]
    assert decays == {0.1, 0.0}
    assert {group["lr"] for group in nested.param_groups} == {4e-4}


@pytest.mark.parametrize("size", TOKENS)
def test_a_file_without_an_override_is_hope(size: str) -> None:
    run = nestopt.load(FOLDER / f"{size}.yaml")
    assert isinstance(run, Config)
    assert run.to_data() == config(f"hope-{size}").to_data()


@pytest.mark.parametrize("size", TOKENS)
@pytest.mark.parametrize(
    ("file", "world", "overrides"), [("ds_8x80gb", 8, ()), ("ds_1gpu", 1, ("train.accumulate=128",))]
)
def test_the_machine_s_settings_and_the_run_s_agree(
    size: str, file: str, world: int, overrides: tuple[str, ...]
) -> None:
    run = config(f"hope-{size}", *overrides)
    run.train.deepspeed = read(FOLDER / f"{file}.json")
    settings = merged(run, world)
    assert stage_of(settings) == 1
    assert settings["bf16"]["enabled"] is True
    assert settings["gradient_clipping"] == 1.0
    micro = settings["train_micro_batch_size_per_gpu"]
    assert micro >= 1
    assert micro * run.train.accumulate * world == run.data.batch == settings["train_batch_size"]
    assert run.data.workers <= run.data.batch // world


def test_the_json_files_say_nothing_that_is_the_run_s() -> None:
    for file in ("ds_8x80gb", "ds_1gpu"):
        given = json.loads((FOLDER / f"{file}.json").read_text())
        ours = {key: given[key] for key in given if key.startswith(("train_", "gradient_"))}
        assert set(ours.values()) == {"auto"}
        assert given["bf16"] == {"enabled": "auto"}


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_slurm_starts_each_task_with_its_number(tmp_path: Path) -> None:
    """With commands in the place of SLURM's and Python that say what they are given."""
    commands = {
        "scontrol": 'printf "%s\\n" node07 node08',
        "srun": 'shift; for i in 0 1; do SLURM_PROCID=$((8 + i)) SLURM_LOCALID=$i SLURM_NTASKS=16 "$@"; done',
        "python": 'echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT | $*"',
    }
    for name, body in commands.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["bash", FOLDER / "slurm.sh", "a.yaml", "model=hope-1.3b", "data.path=a b"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_NODELIST": "node[07-08]", "SLURM_JOB_ID": "45001"},
        capture_output=True,
        text=True,
        check=True,
    )
    line = "train a.yaml model=hope-1.3b data.path=a b --deepspeed examples/scale/ds_8x80gb.json"
    assert done.stdout.splitlines() == [f"{8 + i} {i} 16 node07 25001 | -m nestopt {line}" for i in range(2)]
