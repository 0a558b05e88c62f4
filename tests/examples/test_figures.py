"""The committed figures are what their scripts draw now."""

from __future__ import annotations

import runpy
import xml.etree.ElementTree
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("script", sorted(path.name for path in (DOCS / "figures").glob("*.py")))
def test_figures_are_current(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main = runpy.run_path(str(DOCS / "figures" / script))["main"]
    monkeypatch.setitem(main.__globals__, "STATIC", tmp_path)
    main()
    made = sorted(tmp_path.iterdir())
    assert made
    for file in made:
        xml.etree.ElementTree.parse(file)
        assert file.read_text(encoding="utf-8") == (DOCS / "_static" / file.name).read_text(encoding="utf-8"), (
            f"{file.name} is out of date; run python docs/figures/{script}"
        )
