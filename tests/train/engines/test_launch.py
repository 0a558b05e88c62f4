"""Which process this is, as each launcher says it."""

from __future__ import annotations

import os

import pytest

from nestopt.config import Config, ConfigError
from nestopt.train import engines
from nestopt.train.engines import launch

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def env(monkeypatch):
    for name in [*NAMES, *(name for name in os.environ if name.startswith("SLURM_"))]:
        monkeypatch.delenv(name, raising=False)

    def put(**given):
        for name, value in given.items():
            monkeypatch.setenv(name, value)

    yield put
    for name in NAMES:  # what was set by hand
        os.environ.pop(name, None)


SLURM = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_NTASKS": "16", "SLURM_LOCALID": "1"}


def test_outside_any_launcher_there_is_one(env):
    assert launch.processes() == 1
    launch.prepare()
    assert "RANK" not in os.environ
    launch.alone()
    assert [os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == ["0", "1", "0"]


def test_torchrun_says_it_all(env):
    env(RANK="1", WORLD_SIZE="4", LOCAL_RANK="1", MASTER_ADDR="a", MASTER_PORT="1", **SLURM)
    assert launch.processes() == 4
    launch.prepare()
    assert os.environ["RANK"] == "1"


def test_slurm_s_own_variables_are_enough(env):
    env(**SLURM, SLURM_JOB_NODELIST="node7", SLURM_JOB_ID="123456")
    assert launch.processes() == 16
    launch.prepare()
    assert [os.environ[name] for name in NAMES] == ["5", "16", "1", "node7", str(20000 + 123456 % 20000)]


def test_on_several_machines_slurm_must_say_which_is_the_first(env):
    env(**SLURM, SLURM_JOB_NODELIST="node[7-8]")
    with pytest.raises(ConfigError, match=r"MASTER_ADDR.*node\[7-8\].*scontrol"):
        launch.prepare()
    env(MASTER_ADDR="node7")
    launch.prepare()
    assert os.environ["RANK"] == "5"


def test_a_shell_within_an_allocation_is_one_process(env):
    env(SLURM_NTASKS="16", SLURM_PROCID="0", SLURM_LOCALID="0")
    assert launch.processes() == 1


def test_several_single_processes_are_refused(env):
    env(WORLD_SIZE="2", RANK="0")
    with pytest.raises(ConfigError, match=r"train.engine.*2 processes were started; give ddp, fsdp2 or deepspeed"):
        engines.make(Config())


def test_float16_needs_losses_that_are_scaled(env):
    config = Config()
    config.train.dtype = "float16"
    with pytest.raises(ConfigError, match=r"train.dtype.*deepspeed"):
        engines.make(config)
