"""Cells of tables, without any import of what is measured."""

from __future__ import annotations

import math
from collections.abc import Sequence


def grid(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells, the first of them the heads, as the lines of a Markdown table."""
    heads, *rest = rows
    rows = [heads, ["---", *["---:"] * (len(heads) - 1)], *rest]
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    return [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]


def number(value: float | None) -> str:
    """Three significant digits, without exponents; a dash for what could not be had."""
    if value is None or math.isnan(value):
        return "–"
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{round(value, digits):,.{min(digits, 4)}f}"
