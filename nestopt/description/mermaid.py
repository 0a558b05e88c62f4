"""A description as a Mermaid flowchart."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from nestopt.description.rows import Row, direct, edges
from nestopt.description.text import shorten

NAME_COLUMNS = 48
PLAIN = " .,:_-+=·×→²…()[]/"


def render(levels: Sequence[Sequence[Row]]) -> str:
    """Draw levels, given slowest first, as subgraphs from the top down."""
    lines, number = ["flowchart TB"], 0
    firsts = []
    for i, level in enumerate(levels):
        firsts.append(number)
        lines.append(f'  subgraph L{i + 1}["level {i + 1}: {escape(level[0].memory.frequency)}"]')
        for row in level:
            lines.append(f'    m{number}["{_label(row)}"]')
            number += 1
        lines.append("  end")
    needed = direct(edges(levels))
    lines += [f"  m{needing} -->|needs| m{other}" for needing, other in needed]
    # an unseen link keeps a level below the one before it where no arrow does
    lines += [f"  m{a} ~~~ m{b}" for a, b in itertools.pairwise(firsts) if (a, b) not in needed]
    return "\n".join(lines) + "\n"


def _label(row: Row) -> str:
    memory = row.memory
    what = " · ".join(filter(None, (memory.memory, memory.objective)))
    lines = [shorten(memory.name, NAME_COLUMNS) + row.times, what, f"rule: {memory.rule}" if memory.rule else ""]
    return "<br/>".join(escape(line) for line in lines if line)


def escape(text: str) -> str:
    """Write as entities what Mermaid, Markdown or HTML would read as more than text."""
    return "".join(char if char.isalnum() or char in PLAIN else _entity(char) for char in text)


def _entity(char: str) -> str:
    return f"#{ord(char)};" if char.isprintable() else " "
