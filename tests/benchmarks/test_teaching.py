"""What teaches the MLPs of a HopeLM, compared."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import teaching


@pytest.mark.slow
def test_both_signals_side_by_side(tmp_path: Path) -> None:
    said = teaching.main(
        ["--blocks", "2", "--steps", "3", "--bytes", "2100", "--periods", "16", "--out", str(tmp_path / "report.md")]
    )
    (cosines,) = (line.rsplit(":", 1)[1].split() for line in said.splitlines() if "cosine" in line)
    assert float(cosines[-1]) == 1.0  # nothing comes after the last block
    assert 0 < float(cosines[0]) < 0.99
    rows = {line.split("|")[1].strip(): line for line in said.splitlines() if line.startswith("| ")}
    assert {"none", "residual", "exact"} <= set(rows)
    assert rows["residual"].split("|")[4:] != rows["exact"].split("|")[4:]
    assert cosines[0] in (tmp_path / "report.md").read_text(encoding="utf-8")
