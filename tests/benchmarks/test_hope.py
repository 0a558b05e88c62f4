"""The benchmark of Hope's parts, at toy size: what it trains, and that it runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import hope
from nestopt.config import load
from nestopt.levels.self_modifying.level import SelfModifying
from nestopt.train.compare import parameters


def test_each_part_is_off_in_its_row() -> None:
    config = load(hope.HOPE)
    rows = {row.name: row for row in hope.variants(config)}
    adaptive = {
        name: [level.adaptive for level in row.model.mixers if isinstance(level, SelfModifying)]
        for name, row in rows.items()
    }
    assert adaptive["all six memories"] == [hope.MEMORIES]
    for name in hope.MEMORIES:
        assert adaptive[f"without {name}"] == [tuple(n for n in hope.MEMORIES if n != name)]
    assert adaptive["only the memory that answers"] == [()]
    assert adaptive["attention in their place"] == adaptive[hope.TRANSFORMER] == []
    assert rows[hope.WHOLE].model == config.model
    assert rows[hope.TRANSFORMER].parameters == pytest.approx(parameters(config.model), rel=0.01)


def test_it_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog.\n" * 400)
    small = [f'data.path="{text}"', "data.window=16", "data.batch=2", "model.dim=16", "model.heads=2", "model.blocks=2"]
    out, kept = tmp_path / "hope.md", tmp_path / "hope.json"
    options = ["--steps", "3", "--time", "3", "--rounds", "1", "--bytes", "256", "--only", hope.WHOLE]
    rows = hope.main([*options, "--set", *small, "train.eval_streams=2", "--out", str(out), "--json", str(kept)])
    assert [row.name for row in rows] == [hope.TRANSFORMER, hope.WHOLE]
    for row in rows:
        assert row.tokens is not None
        assert row.seconds is not None
        assert all(0 < bits < 9 for bits in (*row.tokens, *row.seconds))
        assert row.name in out.read_text(encoding="utf-8")
    assert rows[0].slowdown == 1
    assert json.loads(kept.read_text(encoding="utf-8"))["rows"][1]["name"] == hope.WHOLE
    assert hope.WHOLE in capsys.readouterr().out
