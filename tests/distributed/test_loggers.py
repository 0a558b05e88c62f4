"""Loggers and callbacks in a job of two processes: the first one alone has them, and both end together."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from nestopt.train.report.metrics import read
from nestopt.train.run import Run
from tests.distributed.conftest import torchrun
from tests.train.folders.small import small

pytestmark = pytest.mark.distributed


def test_the_first_process_alone_logs_and_both_are_stopped_by_a_callback(text: str, tmp_path: Path) -> None:
    still = {"optimizer__lr": 0.0, "optimizer__rest": {"lr": 0.0}}
    config = small(Path(text), tmp_path / "runs", train__engine="ddp", train__steps=30, train__eval_every=2, **still)
    config.train.loggers = ["csv"]
    config.train.callbacks = [{"callback": "early_stopping", "patience": 2}]
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    status, output = torchrun(2, "-m", "nestopt", "train", tmp_path / "run.yaml")
    assert status == 0, output
    assert output.count("the run has ended: early_stopping: held-out text was no better than") == 1
    (run,) = [Run(path.parent) for path in (tmp_path / "runs").glob("*/config.yaml")]
    records = read(run.metrics_file)
    assert [record["step"] for record in records if "train/loss" in record] == list(range(1, 7))
    with open(run.path / "metrics.csv", encoding="utf-8", newline="") as file:
        assert [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)] == records
