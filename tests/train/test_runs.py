"""Runs by name, listed, compared and swept, as a person types it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from nestopt.cli import main
from nestopt.config import ConfigError
from nestopt.train import runs
from nestopt.train.loop import train
from nestopt.train.report.metrics import read
from nestopt.train.run import Run
from nestopt.train.sweep import Choices, split
from tests.train.folders.small import small

SMALL = ["model.dim=16", "model.blocks=1", "model.heads=2", "data.window=16", "data.batch=4", "train.steps=3"]
SMALL += ["train.eval_every=2", "train.eval_bytes=200", "train.final_bytes=200", "train.sample_bytes=0"]
SMALL += ["train.log_every=1", "train.device=cpu", "train.threads=1"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def cells(text: str) -> list[dict[str, str]]:
    """The rows of the first table in a text, by column (of names without spaces)."""
    lines = text.replace("held out", "held_out").replace("not ended", "not_ended").splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("run "))
    names = lines[begin].split()
    end = next(i for i, line in enumerate(lines) if line.startswith("training, held_out and best"))
    return [dict(zip(names, line.split(), strict=True)) for line in lines[begin + 1 : end]]


def test_a_run_has_a_name_and_the_newest_is_latest(text: Path, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["train", "--data", str(text), "-q", *SMALL]
    assert main([*given, "--name", "one"]) == 0
    assert main(given) == 0
    assert main([*given, "train.name=b.2"]) == 0
    assert sorted(path.name for path in (here / "runs").iterdir()) == ["001", "b.2", "one"]
    for number, name in enumerate(("b.2", "one", "001")):  # in the order of their files' times, the last is newest
        os.utime(here / "runs" / name / "config.yaml", ns=(number, number))
    for path in ("latest", "runs/latest", "001", here / "runs" / "latest"):
        assert Run.open(path).path.name == "001", path
    assert Run.open("one").path == Path("runs/one")
    assert main(["train", "--resume", "latest", "-q", "train.steps=5"]) == 0
    assert read(Run.open("001").metrics_file)[-1]["step"] == 5
    assert main(["generate", "one", "--length", "3"]) == 0
    assert main(["describe", "latest"]) == 0
    assert main([*given, "--init-from", "latest"]) == 0
    capsys.readouterr()
    assert main([*given, "--name", "one"]) == 2
    said = capsys.readouterr().err
    assert (
        "train.name: 'one' is not allowed; runs/one is there already; give another, or go on with it: --resume" in said
    )
    assert main(["train", "--resume", "one", "--name", "two"]) == 2
    assert "only train.* can be changed, not --name" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["latest", "", ".hidden", "a/b", "..", "a b", "x" * 101])
def test_names_that_no_run_can_have(name: str, text: Path, here: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.name"):
        small(text, here, train__name=name)


def test_latest_where_there_is_none(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "latest"]) == 2
    assert "latest is not a run: it has no config.yaml" in capsys.readouterr().err
    assert main(["runs"]) == 2
    assert "runs is no run, and no folder with runs; give one, or begin one: nestopt train" in capsys.readouterr().err
    (here / "runs").mkdir()
    assert main(["runs"]) == 2
    assert "runs has no runs in it" in capsys.readouterr().err


def test_runs_are_listed_with_that_in_which_they_differ(text: Path, here: Path, capsys: Any) -> None:
    results = {}
    for name, lr in (("slow", 0.001), ("fast", 0.05)):
        config = small(text, here / "runs", optimizer__lr=lr, train__name=name, train__steps=6)
        results[name] = train(config, quiet=True)
    (here / "runs" / "broken").mkdir()
    (here / "runs" / "broken" / "config.yaml").write_text("optimizer: {stack: gone}\n")
    (here / "runs" / "begun").mkdir()
    (here / "runs" / "begun" / "config.yaml").write_text((here / "runs" / "fast" / "config.yaml").read_text())
    assert main(["runs", "--plot", "all.png"]) == 0
    out = capsys.readouterr().out
    rows = {row["run"]: row for row in cells(out)}
    assert list(rows) == ["begun", "broken", "fast", "slow"]
    for name, result in results.items():
        row = rows[name]
        assert (row["state"], row["steps"]) == ("ended", "6")
        assert row["held_out"] == f"{result.bits_per_byte:.3f}"
        scores = [
            record["eval/bits_per_byte"] for record in read(result.run.metrics_file) if "eval/bits_per_byte" in record
        ]
        assert row["best"] == f"{min(scores):.3f}"
    assert (rows["slow"]["lr"], rows["fast"]["lr"]) == ("0.001", "0.05")
    assert rows["begun"]["state"] == "not_ended"
    assert rows["broken"]["state"] == "unreadable"
    assert "broken: " in out.splitlines()[-1]
    assert "gone" in out.splitlines()[-1]
    assert (here / "all.png").read_bytes().startswith(b"\x89PNG")

    assert main(["runs", "runs/slow", "fast", "--json"]) == 0
    found = {row["run"]: row for row in json.loads(capsys.readouterr().out)}
    assert found["runs/slow"]["eval/bits_per_byte"] == results["slow"].bits_per_byte
    assert found["runs/fast"]["config"]["optimizer.lr"] == 0.05
    assert main(["runs", "begun", "--plot", "x.png"]) == 2
    assert "--plot: nothing to draw" in capsys.readouterr().err
    assert main(["runs", "--plot", "x.txt"]) == 2
    assert "--plot: 'x.txt' is not allowed; give a file that ends in" in capsys.readouterr().err


def test_many_keys_are_named_and_not_all_columns(text: Path, here: Path) -> None:
    changes = {"optimizer__lr": 0.01, "optimizer__weight_decay": 0.1, "data__batch": 8, "train__seed": 3}
    changes |= {"train__warmup": 0.1, "train__clip": 2.0, "train__keep": 2, "train__log_every": 3, "model__conv": 0}
    changes |= {"train__decay": 0.5}
    for name, given in (("a", {}), ("b", changes)):
        Run.create(small(text, here, train__name=name, **given))
    found = runs.find([str(here)])
    assert len(runs.differing(found)) == 10
    assert "they differ in 2 more keys: " in runs.table(found)


def test_what_a_sweep_is_given() -> None:
    assert split("a, b,[c, d],{e: 1, f: 2},'g,h'") == ["a", "b", "[c, d]", "{e: 1, f: 2}", "'g,h'"]
    choices = Choices.of(["run.yaml", "a=1,2", "b=[1,2]", "c=x,y"])
    assert choices.fixed == ["run.yaml", "b=[1,2]"]
    assert list(choices) == [["a=1", "c=x"], ["a=1", "c=y"], ["a=2", "c=x"], ["a=2", "c=y"]]
    for given, words in ((["a=1"], "nothing to choose"), (["a=1,"], "empty"), (["a=1,2", "a=3,4"], "each key once")):
        with pytest.raises(ConfigError, match=words):
            Choices.of(given)


def test_a_sweep_trains_every_choice_and_shows_all(text: Path, here: Path, capsys: Any) -> None:
    given = ["--data", str(text), "-q", *SMALL]
    assert main(["sweep", *given, "optimizer.lr=0.01,0.02", "model.mixer=deltanet,linear_attention"]) == 0
    out = capsys.readouterr().out
    rows = cells(out)
    assert [(row["lr"], row["mixer"], row["state"], row["steps"]) for row in rows] == [
        (lr, mixer, "ended", "3") for lr in ("0.01", "0.02") for mixer in ("deltanet", "linear_attention")
    ]
    assert "1 of 4: optimizer.lr=0.01 model.mixer=deltanet" in out
    folder = here / "runs" / "sweep-1"
    assert sorted(path.name for path in folder.iterdir()) == ["001", "002", "003", "004", "compare.png"]
    assert [row["run"] for row in cells(_listed(capsys))] == [f"sweep-1/00{n}" for n in range(1, 5)]

    # a choice that fails is said, and the others go on
    assert main(["sweep", *given, "optimizer.lr=1e30,0.01", "optimizer.stack=gd", "--name", "wild"]) == 1
    out = capsys.readouterr().out
    assert "optimizer.lr=1e30: FAILED: " in out
    assert [row["state"] for row in cells(out)] == ["not_ended", "ended"]
    assert main(["sweep", *given, "optimizer.lr=1,2", "--name", "wild"]) == 2
    assert "--name: 'wild' is not allowed; runs/wild is there already" in capsys.readouterr().err


def _listed(capsys: Any) -> str:
    assert main(["runs"]) == 0
    return str(capsys.readouterr().out)


def test_a_sweep_that_cannot_be_begins_none(text: Path, here: Path, capsys: Any, monkeypatch: Any) -> None:
    given = ["--data", str(text), "-q", *SMALL]
    for more, words in (
        (["optimizer.lr=0.1,-1"], "optimizer.lr: -1 is not allowed"),
        (["model.heads=2,3"], "model.heads: 3 is not allowed"),
        (["train.seed=0"], "nothing to choose from; give a key with values between commas"),
        (["train.out=a,b"], "neither train.out nor train.name"),
        (["train.seed=0,1", "--name", "a/b"], "name: 'a/b' is not allowed"),
    ):
        assert main(["sweep", *given, *more]) == 2, more
        assert words in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["sweep", *given, "train.seed=0,1"]) == 2
    assert "a sweep trains in one process" in capsys.readouterr().err
    assert not list(here.glob("runs/*"))
