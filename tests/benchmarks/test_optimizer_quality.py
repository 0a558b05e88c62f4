"""The sweep of optimizers: what is run, kept and shown."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks.optimizer_quality.__main__ import main
from benchmarks.optimizer_quality.problems import ON_DIGITS, PROBLEMS
from benchmarks.optimizer_quality.rows import ROWS, Setting
from benchmarks.optimizer_quality.sweep import (
    Cost,
    Found,
    Result,
    Run,
    append,
    append_cost,
    read,
    repeated,
    search,
    search_in_time,
)
from benchmarks.optimizer_quality.table import files, losses_table, outcomes, pairs_table, ranks_table

DOCS = Path(__file__).parents[2] / "docs"


def result(loss: float) -> Result:
    return Result(loss, loss + 1, loss, 1.0)


def test_settings_are_chosen_alike() -> None:
    tried: list[Run] = []

    def parabola(run: Run) -> Result:
        tried.append(run)
        better = {"beta": 0.1, "decay": -0.1, "alpha": 0.2}
        return result(math.log10(run.rate / 20) ** 2 - sum(better[name] for name, _ in run.options))

    best = search(Run("gpt", "gd", 10, 1.0), ({"beta": 0.5}, {"alpha": 2.0}), 3, parabola)
    # three rates, √10 apart; more until 32 is seen to be too much; the two between; and what else there is
    assert [run.rate for run in tried[:5]] == [0.32, 1.0, 3.2, 10.0, 32.0]
    assert 100.0 in {run.rate for run in tried[5:6]}
    assert [run.rate for run in tried[6:8]] == [18.0, 57.0]
    assert [dict(run.options) for run in tried[8:]] == [{"decay": 1e-3}, {"beta": 0.5}, {"alpha": 2.0, "beta": 0.5}]
    assert best == Run("gpt", "gd", 10, 18.0, (("alpha", 2.0), ("beta", 0.5)))
    assert [run.seed for run in repeated(best, 3)] == [1, 2, 3]


def test_what_diverges_gives_way_to_smaller_rates() -> None:
    best = search(
        Run("gpt", "gd", 10, 1.0), ({}, {}), 3, lambda run: result(math.inf if run.rate > 0.02 else -run.rate)
    )
    assert best.rate == pytest.approx(0.018)


def test_steps_that_fit_into_the_time_have_a_rate_of_their_own() -> None:
    best = Run("gpt", "gd", 150, 0.1, (("decay", 1e-3),))
    found = [
        search_in_time(best, Cost(1.0, ratio, 4.0), 3, lambda run: result(abs(math.log(run.rate))))
        for ratio in (1.0, 1.02, 0.9, 3.9, 1000.0)
    ]
    assert found[:2] == [best, best]
    assert [run.steps for run in found[2:]] == [167, 38, 1]
    assert {(run.rate, run.options) for run in found[2:]} == {(1.0, best.options)}


@pytest.mark.parametrize("name", sorted(ROWS))
def test_every_row_takes_its_options(name: str) -> None:
    row = ROWS[name]
    if not row.is_installed:
        pytest.skip(f"needs {row.needs}")
    shared = {"decay", "rest"}
    for own in row.own:
        torch.manual_seed(0)
        task = PROBLEMS["gpt"](0)
        options = {key: value for key, value in own.items() if key not in shared}
        given = {key: value for key, value in own.items() if key in shared}
        before = [param.detach().clone() for param in task.model.parameters()]
        for one in row.make(Setting(task.model, row.middle, options=options, **given)):
            for step in range(2):
                task.model.zero_grad()
                task.loss(step).backward()
                one.step()
        assert any(not torch.equal(old, new) for old, new in zip(before, task.model.parameters(), strict=True))


def test_a_sweep_goes_on_where_it_was_cut_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "found.jsonl"
    given = ["--problems", "embedding", "--optimizers", "adamw,torch SGD, momentum", "--seeds", "2", "--rates", "1"]
    given += ["--steps", "2", "--out", str(out)]
    main(given)
    whole, shown = out.read_text(encoding="utf-8"), capsys.readouterr()
    runs = shown.err.count("Run(")
    assert runs == len(read(out).results) > 20
    lines = whole.splitlines()
    out.write_text("\n".join(lines[:-3]) + "\n" + lines[-3][:30], encoding="utf-8")
    main(given)
    again = capsys.readouterr()
    assert again.out == shown.out
    assert "`torch SGD, momentum`" in shown.out
    assert again.err.count("Run(") == 3
    assert len(read(out).costs) == 2


def found_in(tmp_path: Path, losses: dict[str, tuple[float, ...]], ratio: float = 1.0) -> Found:
    """What a sweep of two problems leaves, where every setting is as good."""
    out = tmp_path / "found.jsonl"
    for problem in ("digits", "gpt"):
        for name, own in losses.items():
            row, seeds = ROWS[name], len(own)
            found: dict[Run, Result] = {}

            def flat(run: Run, found: dict[Run, Result] = found) -> Result:
                return found.setdefault(run, result(abs(math.log(run.rate))))

            best = search(Run(problem, name, 200, row.middle), row.own, 3, flat)
            cost = Cost(2.0, 1.0 if name == "adamw" else ratio, 4.0)
            for one in (best, search_in_time(best, cost, 3, flat)):
                found |= {run: result(loss - 1) for run, loss in zip(repeated(one, seeds), own, strict=True)}
            for run, value in found.items():
                append(out, run, value)
            append_cost(out, problem, name, cost)
    return read(out)


def test_ranks_and_differences(tmp_path: Path) -> None:
    losses = {"adamw": (1.0, 1.1, 1.2), "muon": (0.9, 0.95, 1.1), "momentum": (2.0, math.inf, 2.0)}
    known = outcomes(found_in(tmp_path, losses), PROBLEMS, 200, 3, 3)
    lines = ranks_table(known).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["`muon`", "`adamw`", "`momentum`"]
    assert lines[2].startswith("| `muon` | 1.0 ± 0.0 | 1.0 ± 0.0 | ")
    assert "| `adamw` | 1.100 ± 0.100 | 1.100 ± 0.100 |" in losses_table(known)
    assert "| `momentum` | diverges | diverges |" in losses_table(known)
    assert "| 0.983 ± 0.104 (200) |" in losses_table(known, in_time=True)
    # 0.117 on the mean, beyond two of its standard errors, and all seeds agree
    assert "| **−0.117 ± 0.017** | **−0.117 ± 0.017** | 2 better, 0 level, 0 worse |" in pairs_table(
        known, [("muon", "adamw")]
    )


def test_a_row_that_is_not_whole_is_left_out(tmp_path: Path) -> None:
    found = found_in(tmp_path, {"adamw": (1.0, 1.1), "gd": (2.0, 2.1)}, ratio=2.0)
    found.results = {run: value for run, value in found.results.items() if run != max(found.results)}
    known = outcomes(found, PROBLEMS, 200, 3, 2)
    assert list(known["digits"]) == ["adamw", "gd"]
    assert list(known["gpt"]) == ["adamw"]
    assert "| `gd` | 2.050 ± 0.071 (100) | – |" in losses_table(known, in_time=True)


def test_the_pages_are_of_what_was_found() -> None:
    known = outcomes(read(DOCS / "choosing" / "runs.jsonl"), PROBLEMS, 150, 3, 3)
    for path, text in files(known).items():
        assert (DOCS / path).read_text(encoding="utf-8") == text


def test_a_file_keeps_infinity_and_the_options(tmp_path: Path) -> None:
    run = Run("gpt", "adam", 100, 0.3).but(decay=1e-3).but(beta=0.9)
    append(tmp_path / "found", run, result(math.inf))
    assert read(tmp_path / "found").results == {run: dataclasses.replace(result(math.inf))}
    assert json.loads((tmp_path / "found").read_text(encoding="utf-8"))["options"] == {"beta": 0.9, "decay": 0.001}


def test_what_there_is_not_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--optimizers", "gd,sgd"])
    assert "'sgd' begins with none of" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(PROBLEMS))
def test_a_problem_is_its_seeds(name: str) -> None:
    if name in ON_DIGITS:
        pytest.importorskip("sklearn")
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        task = PROBLEMS[name](seed)
        loss = task.loss(0)
        loss.backward()
        assert all(param.grad is not None and param.grad.isfinite().all() for param in task.model.parameters())
        losses.append(float(loss.detach()))
    with torch.no_grad():
        validation, test = task.validation(), task.test()
    assert validation.isfinite()
    assert test.isfinite()
    assert validation != test
    assert losses[0] == losses[1] != losses[2]
