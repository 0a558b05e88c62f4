"""A description as an aligned table."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from nestopt.description.rows import Row
from nestopt.description.text import count, shorten, size, width

COLUMNS = 110
HEADS = ("level", "name", "frequency", "memory", "objective", "rule", "parameters", "state")
RIGHT = {"parameters", "state"}
SHRINKABLE = {"name": 24, "objective": 10, "rule": 10, "memory": 8}
"""Columns that give way when a table is too wide, and how narrow each may become."""


def render(title: str, levels: Sequence[Sequence[Row]], footer: Sequence[str]) -> str:
    """Write levels as a table, at most `COLUMNS` wide, unless names that can not be cut any shorter need more."""
    lines = [_cells(i, row, first=row is level[0]) for i, level in enumerate(levels, 1) for row in level]
    keep = [head for head in HEADS if head not in RIGHT or any(line[head] for line in lines)]
    widths = _widths(keep, lines)
    ruled = "─" * (sum(widths.values()) + 2 * (len(keep) - 1))
    out = [title, ruled, _line(dict(zip(HEADS, HEADS, strict=True)), widths), ruled]
    out += [_line(line, widths) for line in lines]
    out.append(ruled)
    for text in footer:
        out += textwrap.wrap(text, COLUMNS, subsequent_indent="  ")
    return "\n".join(out)


def _cells(level: int, row: Row, first: bool) -> dict[str, str]:
    memory = row.memory
    return {
        "level": str(level) if first else "",
        "name": memory.name + row.times,
        "frequency": memory.frequency,
        "memory": memory.memory or "—",
        "objective": memory.objective or "—",
        "rule": memory.rule or "—",
        "parameters": count(memory.parameters),
        "state": "grows" if memory.grows else size(memory.state),
    }


def _widths(heads: Sequence[str], lines: Sequence[dict[str, str]]) -> dict[str, int]:
    widths = {head: max([width(head), *(width(line[head]) for line in lines)]) for head in heads}
    room = COLUMNS - 2 * (len(heads) - 1)
    while sum(widths.values()) > room:
        slack = {head: widths[head] - least for head, least in SHRINKABLE.items() if widths[head] > least}
        if not slack:
            break
        widths[max(slack, key=slack.__getitem__)] -= 1
    return widths


def _line(cells: dict[str, str], widths: dict[str, int]) -> str:
    return "  ".join(_cell(head, cells[head], columns) for head, columns in widths.items()).rstrip()


def _cell(head: str, text: str, columns: int) -> str:
    name, times, number = text.rpartition(" × ")
    text = shorten(name, columns - width(times + number)) + times + number if times else shorten(text, columns)
    space = " " * (columns - width(text))
    return space + text if head in RIGHT else text + space
