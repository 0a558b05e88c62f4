"""The table of levels and engines: it has every level, and says of each what is done with it."""

from __future__ import annotations

import re
from pathlib import Path

import nestopt
from tests.distributed.settings import ENGINES, LEVELS

PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"


def cells() -> dict[str, dict[str, str]]:
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    begin = next(i for i, line in enumerate(lines) if line.startswith("| level | `ddp`"))
    split = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines[begin:]]
    table: dict[str, dict[str, str]] = {}
    for row in split[2:]:
        if len(row) != len(split[0]) or "," in row[1]:
            break
        table[row[0]] = dict(zip([name.lower() for name in split[0][1:]], row[1:], strict=True))
    return table


def test_its_rows_are_the_levels_on_gradients() -> None:
    pages = {path.stem for path in (PAGE.parent / "levels").glob("*.md")} - {
        "index",
        "composing",
        "links",
        "newton_schulz",
        "recipes",
    }
    assert list(cells()) == list(LEVELS)
    assert set(LEVELS) == pages


def test_its_cells_are_what_is_done() -> None:
    """That this is the same as in one process, tests/distributed shows, cell by cell."""
    for name, row in cells().items():
        assert list(row) == list(ENGINES)
        level = nestopt.build("level", LEVELS[name])
        cut = "slices" if level.is_elementwise else "owner"
        assert row == {engine: "whole" if engine in ("ddp", "zero 0") else cut for engine in ENGINES}, name


def test_figures_have_their_command() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert re.search(r"measured by `python benchmarks/distributed.py`", text)
