"""How time grows with the number of tokens."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from benchmarks.layer_rows import MODES
from benchmarks.report import grid, number

Times = dict[tuple[str, int, str], dict[int, float]]
"""Seconds by (row, chunk, mode) and then by tokens."""


@dataclasses.dataclass
class GrowthLine:
    """Attributes:
    name: of the row.
    exponents: by mode, between the first length and the last that was timed; None where there is one length only.
    last: by mode, that last length.
    """

    name: str
    exponents: dict[str, float | None]
    last: dict[str, int]


@dataclasses.dataclass
class Growth:
    """A table of exponents: time ∝ tokens^exponent."""

    name: str
    first: int
    lines: list[GrowthLine]

    def markdown(self) -> str:
        rows = [["", *(f"{mode}{head}" for mode in MODES for head in (", exponent", ", to tokens"))]]
        for line in self.lines:
            cells = [line.name]
            for mode in MODES:
                cells += [number(line.exponents[mode]), f"{line.last[mode]:,}" if line.last[mode] else "–"]
            rows.append(cells)
        about = f"Time grows as tokens to the power of the exponent, from {self.first:,} tokens to the longest timed."
        return "\n".join([f"### {self.name}", "", about, "", *grid(rows), ""])


def exponent(times: Mapping[int, float]) -> float | None:
    """The slope from the shortest to the longest, logarithms of both; None for fewer than two lengths."""
    if len(times) < 2:
        return None
    short, long = min(times), max(times)
    return math.log(times[long] / times[short]) / math.log(long / short)


def predicted_s(times: Mapping[int, float], tokens: int) -> float:
    """Seconds at a length beyond those timed, by the slope of the last two, at least linear; 0 if none was timed."""
    if not times:
        return 0.0
    last = max(times)
    slope = exponent({n: times[n] for n in sorted(times)[-2:]}) or 1.0
    return times[last] * (tokens / last) ** max(1.0, slope)


def growth(chunk: int, times: Times) -> Growth:
    names = list(dict.fromkeys(name for name, of, _ in times if of == chunk))
    lines = []
    for name in names:
        by_mode = {mode: times.get((name, chunk, mode), {}) for mode in MODES}
        exponents = {mode: exponent(found) for mode, found in by_mode.items()}
        lines.append(GrowthLine(name, exponents, {mode: max(found, default=0) for mode, found in by_mode.items()}))
    first = min((n for (_, of, _), found in times.items() if of == chunk for n in found), default=0)
    return Growth(f"growth, chunks of {chunk}", first, lines)
