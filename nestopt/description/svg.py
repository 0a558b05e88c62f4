"""A description as a drawing: one band per level, the fastest on top, arrows from what is needed to what needs it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from xml.sax.saxutils import escape

from nestopt.description.rows import Row, direct, edges
from nestopt.description.text import count, shorten, size, width

MARGIN, GUTTER = 20, 138
BOX_WIDTH, LINE, PADDING = 246, 17, 11
GAP_X, GAP_Y = 20, 42
PER_LINE = 4
MONO, SANS = 7.3, 6.6
"""Widths that no character of the text exceeds by much, at 12 pixels fixed-width and 11 pixels proportional."""

# the page may be light or dark: what stands on it is a grey that both show, and boxes bring their own ground
GREY = "#76808b"
COLOURS = {"tokens": ("#dbeafe", "#2563a8"), "gradients": ("#fdecc8", "#b06f08"), "fixed": ("#e6e9ed", "#68727d")}
STYLE = "".join(
    # on a page it shares, the style must touch nothing but this drawing
    f".nestopt-levels {rule}"
    for rule in (
        "text{font-family:'DejaVu Sans',Verdana,'Segoe UI',Helvetica,Arial,sans-serif;font-size:11px}",
        ".name{font-family:'DejaVu Sans Mono',Menlo,Consolas,monospace;font-size:12px;font-weight:bold;fill:#17202a}",
        ".in{fill:#2c3640}",
        f".out{{fill:{GREY}}}",
        f".band{{fill:{GREY};font-size:12px;font-weight:bold}}",
        f".title{{fill:{GREY};font-size:15px;font-weight:bold}}",
        f".need{{fill:none;stroke:{GREY};stroke-width:1.4}}",
    )
)


@dataclasses.dataclass
class Box:
    """One row's place in the drawing, by its upper left corner."""

    row: Row
    x: float
    y: float
    lines: list[str]

    @property
    def height(self) -> int:
        return 2 * PADDING + LINE * (1 + len(self.lines)) - 5


def render(title: str, levels: Sequence[Sequence[Row]], footer: Sequence[str]) -> str:
    """Draw levels, given slowest first, from the bottom up; `footer` lines stand below."""
    columns = min(PER_LINE, max([2, *map(len, levels)]))
    inner = columns * BOX_WIDTH + (columns - 1) * GAP_X
    total = 2 * MARGIN + GUTTER + inner
    placed, bands, bottom = _place(levels, inner, top=MARGIN + 44)
    flat = [box for level in placed for box in level]
    pairs = direct(edges(levels))
    lanes = Lanes(flat)
    arrows = [_arrow(flat[other], flat[needing], lanes) for needing, other in pairs]
    body = [_text(MARGIN, MARGIN + 12, shorten(title, int((total - 2 * MARGIN) / 10)), "title")]
    body += _axis(bands, bottom)
    body += arrows
    for box in flat:
        body += _draw(box)
    at = bottom + 12
    notes = ["An arrow leads from a memory to one that needs it first, at the same step."] if arrows else []
    for text in [*footer, *notes]:
        for line in _wrap(text, int((total - 2 * MARGIN) / SANS)):
            body.append(_text(MARGIN, at, line, "out"))
            at += LINE
    height = at + MARGIN - LINE + 5
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{total}" height="{height:g}" viewBox="0 0 {total} {height:g}" '
        f'class="nestopt-levels" role="img"><title>{_escape(title)}</title><style>{STYLE}</style>'
        '<defs><marker id="nestopt-tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        f'orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="{GREY}"/></marker></defs>'
    )
    return "\n".join([head, *body, "</svg>"]) + "\n"


def _place(
    levels: Sequence[Sequence[Row]], inner: int, top: float
) -> tuple[list[list[Box]], list[tuple[float, str]], float]:
    """Return boxes by level, in the order given, the middle and the frequency of each band, and where the bands end."""
    placed: list[list[Box]] = []
    bands, y = [], top
    for level in reversed(levels):
        boxes: list[Box] = []
        begin = y
        for at in range(0, len(level), PER_LINE):
            rows = level[at : at + PER_LINE]
            taken = len(rows) * BOX_WIDTH + (len(rows) - 1) * GAP_X
            left = MARGIN + GUTTER + (inner - taken) / 2
            line = [Box(row, left + i * (BOX_WIDTH + GAP_X), y, _lines(row)) for i, row in enumerate(rows)]
            boxes += line
            y += max(box.height for box in line) + (GAP_X if at + PER_LINE < len(level) else GAP_Y)
        bands.append(((begin + y - GAP_Y) / 2, level[0].memory.frequency))
        placed.append(boxes)
    return placed[::-1], bands, y - GAP_Y + 12


def _lines(row: Row) -> list[str]:
    memory = row.memory
    what = " · ".join(filter(None, (memory.memory, memory.objective)))
    sizes = [count(memory.parameters) and f"{count(memory.parameters)} numbers", size(memory.state)]
    lines = [what, f"rule: {memory.rule}" if memory.rule else "", " · ".join(filter(None, sizes))]
    if memory.grows:
        lines.append("grows with every token")
    return [line for line in lines if line]


def _draw(box: Box) -> list[str]:
    memory = box.row.memory
    fill, stroke = COLOURS["fixed" if memory.period is None else memory.context]
    room = BOX_WIDTH - 2 * PADDING
    times = box.row.times
    name = shorten(memory.name, int(room / MONO) - width(times)) + times
    texts = [_text(box.x + PADDING, box.y + PADDING + 11, name, "name")]
    for i, line in enumerate(box.lines, 1):
        texts.append(_text(box.x + PADDING, box.y + PADDING + 11 + i * LINE, shorten(line, int(room / SANS)), "in"))
    names = "\n".join(box.row.names)
    return [
        f'<g><title>{_escape(names)}</title><rect x="{box.x:g}" y="{box.y:g}" width="{BOX_WIDTH}" '
        f'height="{box.height}" rx="7" fill="{fill}" stroke="{stroke}" stroke-width="1.3"/>',
        *texts,
        "</g>",
    ]


def _axis(bands: Sequence[tuple[float, str]], bottom: float) -> list[str]:
    x, top = MARGIN + GUTTER - 22, MARGIN + 34
    parts = [
        f'<path class="need" d="M{x},{bottom - 12:g} L{x},{top}" marker-end="url(#nestopt-tip)"/>',
        _text(x - 10, top + 4, "faster", "out", end=True),
    ]
    for i, (y, frequency) in enumerate(bands):
        parts.append(f'<path class="need" d="M{x - 4},{y:g} L{x + 4},{y:g}"/>')
        parts.append(_text(x - 10, y + 4, frequency, "band", end=True))
        parts.append(_text(x - 10, y + 19, f"level {len(bands) - i}", "out", end=True))
    return parts


class Lanes:
    """The free ways between the boxes of each line, by which an arrow passes lines that it does not end at."""

    def __init__(self, boxes: Sequence[Box]) -> None:
        self.lines: dict[float, list[Box]] = {}
        for box in boxes:
            self.lines.setdefault(box.y, []).append(box)
        self.taken: dict[tuple[float, float], int] = {}

    def between(self, upper: float, lower: float) -> list[float]:
        """Return upper edges of the lines strictly between two, from the top down."""
        return sorted(y for y in self.lines if upper < y < lower)

    def take(self, y: float, x: float) -> tuple[float, float]:
        """Return the free way through the line at `y` that is nearest to `x`, and the lower edge of that line."""
        boxes = self.lines[y]
        ways = [boxes[0].x - GAP_X / 2, *(box.x + BOX_WIDTH + GAP_X / 2 for box in boxes)]
        way = min(ways, key=lambda at: abs(at - x))
        used = self.taken[y, way] = self.taken.get((y, way), 0) + 1
        # side by side, as far as there is room
        shift = (used // 2) * 4 * (-1) ** used
        return way + max(-8, min(8, shift)), y + max(box.height for box in boxes)


def _arrow(source: Box, target: Box, lanes: Lanes) -> str:
    upper, lower = (source, target) if source.y < target.y else (target, source)
    x, y = upper.x + BOX_WIDTH / 2, float(upper.y + upper.height)
    end_x, end_y = lower.x + BOX_WIDTH / 2, lower.y
    points = [(x, y)]
    for line in lanes.between(upper.y, lower.y):
        x, bottom = lanes.take(line, x + (end_x - x) * (line - y) / (end_y - y))
        points += [(x, line), (x, bottom)]
    points.append((end_x, end_y))
    if upper is target:
        points.reverse()
    path = [f"M{points[0][0]:g},{points[0][1]:g}"]
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        middle = (y0 + y1) / 2
        path.append(f"L{x1:g},{y1:g}" if x0 == x1 else f"C{x0:g},{middle:g} {x1:g},{middle:g} {x1:g},{y1:g}")
    return f'<path class="need" d="{" ".join(path)}" marker-end="url(#nestopt-tip)"/>'


def _text(x: float, y: float, text: str, kind: str, end: bool = False) -> str:
    anchor = ' text-anchor="end"' if end else ""
    return f'<text class="{kind}" x="{x:g}" y="{y:g}"{anchor}>{_escape(text)}</text>'


def _escape(text: str) -> str:
    """Escape text for XML, in which control characters have no place at all."""
    return escape("".join(char if char.isprintable() or char == "\n" else "�" for char in text))


def _wrap(text: str, columns: int) -> list[str]:
    lines = [""]
    for word in text.split():
        word = shorten(word, columns)
        if lines[-1] and width(lines[-1]) + 1 + width(word) > columns:
            lines.append(word)
        else:
            lines[-1] = f"{lines[-1]} {word}".strip()
    return lines
