"""Loggers: what each writes, read by the tools that it is for, and that a run that goes on has everything once."""

from __future__ import annotations

import csv
import importlib
import json
import math
import os
import re
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nestopt.config import ConfigError
from nestopt.train.errors import CheckpointError, MissingExtra
from nestopt.train.loggers import Csv, Jsonl, Tensorboard, Wandb
from nestopt.train.loop import train
from nestopt.train.report.metrics import read
from nestopt.train.run import Run
from nestopt.train.training import Training
from tests.train.folders.small import small

Rows = list[dict[str, Any]]


def killed_and_taken_up(text: Path, out: Path, logger: Any, patch: pytest.MonkeyPatch) -> Run:
    """A run that fails at step 7, three steps after its last checkpoint, and goes on from there."""
    update = Training._update

    def failing(self):
        if self.step == 7:
            raise ZeroDivisionError
        return update(self)

    patch.setattr(Training, "_update", failing)
    config = small(text, out, train__steps=9)
    config.train.loggers = ["jsonl", logger]
    with pytest.raises(ZeroDivisionError):
        train(config, quiet=True)
    patch.undo()
    (run,) = [Run(path.parent) for path in out.glob("*/config.yaml")]
    assert read(run.metrics_file)[-1]["step"] == 7
    assert train(resume=run.path, trust=True, quiet=True).finished
    return run


def measured(records: Rows) -> dict[str, list[tuple[int, float]]]:
    """By name, the steps and values."""
    names = {name for record in records for name in record} - {"step", "seconds"}
    return {name: [(r["step"], r[name]) for r in records if name in r] for name in names}


def test_csv_has_a_row_a_record_and_each_once(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = killed_and_taken_up(text, tmp_path, "csv", monkeypatch)
    with open(run.path / "metrics.csv", encoding="utf-8", newline="") as file:
        rows = [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]
    assert rows == read(run.metrics_file)
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, 10))


def test_csv_begins_with_what_there_is_and_takes_what_is_not_finite(text: Path, tmp_path: Path) -> None:
    config = small(text, tmp_path, train__steps=3)
    run = train(config, quiet=True).run
    logger = Csv()
    before = read(run.metrics_file)
    logger.begin(run, config, before)
    logger.log({"step": 4, "seconds": 1.0, "train/loss": math.nan})
    logger.log({"step": 4, "new": math.inf})
    logger.close()
    with open(run.path / "metrics.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == [*(str(record["step"]) for record in before), "4", "4"]
    assert (rows[-2]["train/loss"], rows[-1]["new"], rows[-1]["train/loss"]) == ("nan", "inf", "")


def test_the_record_of_the_run_is_always_there(text: Path, tmp_path: Path) -> None:
    config = small(text, tmp_path, train__steps=2)
    config.train.loggers = []
    run = train(config, quiet=True).run
    assert [record["step"] for record in read(run.metrics_file)] == [1, 2, 2]
    assert not (run.path / "metrics.csv").exists()
    assert config.train.loggers == []
    assert small(text, tmp_path).train.loggers == [Jsonl()]


def test_tensorboard_by_its_own_reader(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    run = killed_and_taken_up(text, tmp_path, "tensorboard", monkeypatch)
    wanted = measured(read(run.metrics_file))
    reader = EventAccumulator(str(run.path / "tensorboard"))
    reader.Reload()
    found = {tag: [(event.step, event.value) for event in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}
    assert found.keys() == wanted.keys()
    for tag, points in wanted.items():
        assert [step for step, _ in found[tag]] == [step for step, _ in points]
        assert [value for _, value in found[tag]] == pytest.approx([value for _, value in points], rel=1e-6)
    seconds = [record["seconds"] for record in read(run.metrics_file) if "train/loss" in record]
    walls = [event.wall_time for event in reader.Scalars("train/loss")]
    assert walls == sorted(walls)
    assert walls[3] - walls[0] == pytest.approx(seconds[3] - seconds[0], abs=1e-3)
    assert "config/text_summary" in reader.Tags()["tensors"]
    files = list((run.path / "tensorboard").iterdir())  # nothing twice for those who read files by themselves
    events = [event for file in files for event in EventFileLoader(str(file)).Load() if event.summary.value]
    tags = [(value.tag, event.step) for event in events for value in event.summary.value]
    assert len(tags) == len(set(tags))


def blocks(data: bytes) -> Iterator[bytes]:
    """The records of wandb's file, which is a log as LevelDB writes them, after a header of 7 bytes."""
    place, parts, size = 7, b"", 32768
    while place + 7 <= len(data):
        if size - place % size < 7:
            place += size - place % size
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        if place + 7 + length > len(data):  # which is being written
            return
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part of one
            yield parts
            parts = b""


def test_wandb_offline(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = killed_and_taken_up(text, tmp_path, Wandb(project="p", mode="offline"), monkeypatch)
    folders = [path for path in (run.path / "wandb").iterdir() if path.name.startswith("offline-run-")]
    name = (run.path / "wandb.id").read_text()
    assert len(name) == 12
    assert {path.name.rpartition("-")[2] for path in folders} == {name}  # the second part goes on with the first
    from wandb.proto import wandb_internal_pb2

    found: dict[int, dict[str, float]] = {}
    for folder in sorted(folders):
        (file,) = folder.glob("*.wandb")
        deadline = time.monotonic() + 60  # its own process writes it
        records: list[Any] = []
        while not any(record.HasField("exit") for record in records):
            assert time.monotonic() < deadline
            records = [wandb_internal_pb2.Record.FromString(data) for data in blocks(file.read_bytes())]
        for record in records:
            if record.HasField("history"):
                items = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
                step = int(items["_step"])
                found.setdefault(step, {}).update({key: json.loads(value) for key, value in items.items()})
    for key, points in measured(read(run.metrics_file)).items():
        assert {step: row[key] for step, row in found.items() if key in row} == pytest.approx(dict(points)), key


@pytest.mark.parametrize(("name", "package"), [("tensorboard", "tensorboard"), ("wandb", "wandb")])
def test_without_its_extra_it_is_a_sentence_before_there_is_a_run(
    text: Path, tmp_path: Path, name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [module for module in sys.modules if module.split(".")[0] == package or "tensorboard" in module]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)  # as where it is not installed
    config = small(text, tmp_path)
    config.train.loggers = [name]
    with pytest.raises(MissingExtra, match=rf"^{package}.* is not installed; pip install 'nestopt\[{name}\]'$"):
        train(config, quiet=True)
    assert not list(tmp_path.iterdir())
    importlib.invalidate_caches()


@pytest.mark.parametrize("name", ["metrics.csv", "tensorboard", "wandb"])
def test_links_in_the_place_of_what_loggers_write_are_refused(text: Path, tmp_path: Path, name: str) -> None:
    config = small(text, tmp_path / "runs", train__steps=2)
    run = train(config, quiet=True).run
    (tmp_path / "elsewhere").mkdir()
    os.symlink(tmp_path / "elsewhere", run.path / name)
    config.train.loggers, config.train.steps = ["csv"], 4
    with pytest.raises(CheckpointError, match=name):
        train(config, resume=run.path, quiet=True)
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_strangers_run_sends_nothing_untrusted(text: Path, tmp_path: Path) -> None:
    run = train(small(text, tmp_path, train__steps=2), quiet=True).run
    said = run.config_file.read_text()
    run.config_file.write_text(
        re.sub(r"loggers:\s*(- jsonl|\[jsonl\])", "loggers: [jsonl, wandb, csv, tensorboard]", said)
    )
    assert run.config().train.loggers == [Jsonl(), Wandb(), Csv(), Tensorboard()]
    with pytest.raises(ConfigError, match=r"train\.loggers has wandb, which sends to the network; give --trust"):
        train(resume=run.path, quiet=True)
