"""The page on accelerators names every place that waits."""

from __future__ import annotations

import re
from pathlib import Path

from nestopt.core.device import EXCEPTIONS

ROOT = Path(__file__).parents[2]


def test_the_table_of_waits_is_that_of_the_code() -> None:
    text = (ROOT / "docs" / "accelerator.md").read_text(encoding="utf-8").partition("## Where it waits")[2]
    table = dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", text.partition("\n## ")[0], flags=re.M))
    assert table == EXCEPTIONS


def test_every_exception_is_used_and_named() -> None:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "nestopt").rglob("*.py")]
    used = {name for source in sources for name in re.findall(r'by_contract\("(\w+)"\)', source)}
    assert used == set(EXCEPTIONS)
