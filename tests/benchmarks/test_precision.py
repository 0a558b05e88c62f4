"""The benchmark of precisions, on toys."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import precision
from benchmarks.precision import CONTINUUM, HOPE, LEVELS, NAMES, TINY


@pytest.mark.parametrize("name", ["attention", "deltanet", CONTINUUM, HOPE])
def test_errors_are_those_of_the_precision(name: str) -> None:
    found = {row.precision: row for row in precision.rows(name, TINY, torch.device("cpu"))}
    assert set(found) == {"float32", "bfloat16"}
    for precisely, low, high in (("float32", 1e-9, 1e-3), ("bfloat16", 1e-4, 0.03)):
        row = found[precisely]
        assert low < row.y < high
        assert low < row.gradients < high
    assert found["float32"].y < found["bfloat16"].y / 10


def test_it_says_what_was_not_measured_and_writes_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, data = tmp_path / "table.md", tmp_path / "data.json"
    given = ["--tiny", "--device", "cpu", "--tokens", "8", "20", "--only", "^(retnet|ttt)$"]
    assert precision.main([*given, "--markdown", str(table), "--json", str(data)]) == 0
    out = capsys.readouterr().out
    assert "tf32: not measured: the device is 'cpu'" in out
    assert table.read_text() in out
    head, _, *lines = table.read_text().splitlines()
    assert "bfloat16 state" in head
    assert "tf32" not in head
    assert [line.split(" | ")[:2] for line in lines] == [
        [f"| {name}", length] for length in ("8", "20") for name in ("retnet", "ttt")
    ]
    assert {row["name"] for row in json.loads(data.read_text())["rows"]} == {"retnet", "ttt"}


def test_every_level_on_tokens_is_in_it_and_in_the_page() -> None:
    docs = Path(__file__).parents[2] / "docs"
    pages = {path.stem for path in (docs / "tokens").glob("*.md")} - {"index", "step", "cms"}
    assert set(LEVELS) == pages
    shown = [line.split(" | ")[0].removeprefix("| ") for line in (docs / "precision.md").read_text().splitlines()]
    assert set(NAMES) <= set(shown)
