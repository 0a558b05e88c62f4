"""The sweep of optimizers: what is run, kept and shown."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks.optimizer_quality.__main__ import main
from benchmarks.optimizer_quality.problems import ON_DIGITS, PROBLEMS
from benchmarks.optimizer_quality.rows import ROWS
from benchmarks.optimizer_quality.sweep import Result, Run, append, planned, rates, read
from benchmarks.optimizer_quality.table import table


def test_all_optimizers_have_as_many_trials() -> None:
    runs = list(planned(["gpt"], ROWS, 10, 3, 2))
    assert {sum(run.optimizer == name for run in runs) for name in ROWS} == {6}
    assert rates(0.1, 3) == pytest.approx([0.1 / math.sqrt(10), 0.1, 0.1 * math.sqrt(10)], rel=0.05)


def test_a_sweep_goes_on_where_it_was_cut_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "found.jsonl"
    given = ["--problems", "embedding", "--optimizers", "gd,torch SGD, momentum", "--seeds", "2", "--rates", "1"]
    given += ["--steps", "2", "--out", str(out)]
    threads = torch.get_num_threads()
    try:
        main(given)
        whole, shown = out.read_text(encoding="utf-8"), capsys.readouterr().out
        lines = whole.splitlines()
        out.write_text("\n".join(lines[:2]) + "\n" + lines[2][:30], encoding="utf-8")
        main(given)
    finally:
        torch.set_num_threads(threads)
    again = capsys.readouterr()
    losses = [cell for line in again.out.splitlines() for cell in line.split("|")[1:4]]
    assert losses == [cell for line in shown.splitlines() for cell in line.split("|")[1:4]]
    assert "2/2" in again.err
    assert "3/" not in again.err
    assert len(read(out)) == 4


def test_the_best_rate_by_its_mean_over_seeds(tmp_path: Path) -> None:
    out = tmp_path / "found.jsonl"
    for rate, losses in {0.1: (1.0, 3.0), 0.3: (1.5, 1.7), 1.0: (0.1, math.inf)}.items():
        for seed, loss in enumerate(losses):
            append(out, Run("gpt", "gd", 100, rate, seed), Result(loss, loss, 1.0))
    append(out, Run("gpt", "adam", 100, 0.3, 0), Result(math.inf, math.inf, 1.0))
    shown = table(read(out), ["gpt"], ["gd", "adam"])
    assert "| gd | 1.600 ± 0.141 | 1.600 | 0.3 | 10.0 |" in shown
    assert "| adam | diverges |  | 0.3 |  |" in shown
    assert json.loads(out.read_text(encoding="utf-8").splitlines()[0])["optimizer"] == "gd"


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
        assert task.held_out().isfinite()
        losses.append(float(loss.detach()))
    assert losses[0] == losses[1] != losses[2]
