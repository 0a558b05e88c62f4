"""The benchmark of owners, at toy size."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import distributed

pytestmark = pytest.mark.distributed


def test_it_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "distributed.md"
    rows = distributed.main(["--set", "tiny", "--rounds", "2", "--markdown", str(out)])
    assert [row.level for row in rows] == list(distributed.LEVELS)
    by_level = {row.level: row for row in rows}
    numbers = 3 * 24 * 24 + 32 * 16
    for name, copies in (("muon", 1), ("m3", 4), ("adamw", 2)):
        whole, own = by_level[name].state
        assert copies * numbers * 4 <= whole < copies * numbers * 4 + 200
        assert own < 0.7 * whole
    assert 0 < by_level["muon"].sent <= 3 * 4 * numbers // 2
    assert by_level["adamw"].sent == 0
    assert out.read_text() == capsys.readouterr().out
    assert "| muon | tiny |" in out.read_text()
