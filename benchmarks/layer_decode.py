"""Time of one more token, at positions far apart: whether it stays what it was."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.layer_blocks import ATTENTION
from benchmarks.layer_rows import Layer, Row, build
from benchmarks.layer_size import Size
from benchmarks.report import Line, clock_words, grid, line_of, number
from benchmarks.rows import Missing
from benchmarks.timing import Call, failure, interleave

POSITIONS = 64, 1024, 10 * 1024, 100 * 1024
PIECE = 2048  # tokens that a walk to a position takes at once
WALK_CAPS = 4  # a walk may take so many times what the timing of a row may


@dataclasses.dataclass
class DecodeLine:
    """Attributes:
    name: of the row.
    at: a token's time by position; a `Line` with a problem where it could not be had.
    """

    name: str
    at: dict[int, Line] = dataclasses.field(default_factory=dict)

    @property
    def growth(self) -> float | None:
        """The last position's time by the first's."""
        times = [line.step_ms for line in self.at.values() if line.step_ms]
        return times[-1] / times[0] if len(times) > 1 else None


@dataclasses.dataclass
class Decoding:
    """A table of milliseconds a token."""

    name: str
    about: str
    positions: Sequence[int]
    lines: list[DecodeLine]

    def markdown(self) -> str:
        heads = ["", *(f"at {position:,}, ms" for position in self.positions), "last / first"]
        heads += [f"× {ATTENTION} at {self.positions[-1]:,}"]
        rows, problems = [heads], []
        for line in self.lines:
            last = line.at.get(self.positions[-1])
            times = [number(line.at[p].step_ms) if p in line.at else "–" for p in self.positions]
            rows.append([line.name, *times, number(line.growth), number(last.ratio if last else None)])
            problems += [f"- {line.name}, at {p:,}: {at.problem}" for p, at in line.at.items() if at.problem]
        return "\n".join(
            [f"### {self.name}", "", self.about, "", *grid(rows), *([""] if problems else []), *problems, ""]
        )


class _Walker:
    """A layer with its state, which goes from position to position."""

    def __init__(self, layer: Layer, size: Size) -> None:
        self.layer, self.size = layer, size
        self.position, self.pace_s = 0, 0.0
        self.state: Any = None
        self.tokens = torch.randn(size.batch, PIECE, size.dim, generator=torch.Generator().manual_seed(2))

    @torch.no_grad()
    def go(self, position: int, limit_s: float) -> str:
        """Walk to `position`; what hindered it, if something did."""
        if self.layer.jump is not None:
            self.state, self.position = self.layer.jump(self.size.batch, position), position
            return ""
        start, first = time.perf_counter(), self.position
        expected = self.pace_s * (position - first)
        if expected > limit_s:
            return f"left out: about {expected:.0f} s to get there, over {limit_s:g} s"
        while self.position < position:
            piece = self.tokens[:, : min(PIECE, position - self.position)]
            _, self.state = self.layer.stream(piece, self.state)  # type: ignore[misc]
            self.position += piece.shape[1]
            took = time.perf_counter() - start
            if took > limit_s and self.position < position:
                return f"left out: at {self.position:,} after {took:.0f} s, over {limit_s:g} s"
        self.pace_s = (time.perf_counter() - start) / (position - first)
        return ""

    def call(self) -> Call:
        """As many tokens as a chunk has, one at a time, always from here: what happens once a chunk is then in it."""
        following = self.tokens[:, : self.size.chunk].unbind(1)
        return Call(lambda: self._decode([token[:, None] for token in following]), lambda: None)

    @torch.no_grad()
    def _decode(self, following: Sequence[Tensor]) -> None:
        state = self.state
        for token in following:
            _, state = self.layer.stream(token, state)  # type: ignore[misc]


def decode(
    rows: Sequence[Row], size: Size, rounds: int, cap_s: float, positions: Sequence[int] = POSITIONS
) -> Decoding:
    """Times of all rows that can go on from a state, a position at a time, interleaved there."""
    lines: dict[str, DecodeLine] = {}
    walkers: dict[str, _Walker] = {}
    for row in rows:
        try:
            layer = build(row, size)
        except Missing:
            continue  # the other tables say so
        except Exception as error:
            lines[row.name] = DecodeLine(row.name, {positions[0]: Line(row.name, failure(error))})
            continue
        if layer.stream is not None:
            lines[row.name], walkers[row.name] = DecodeLine(row.name), _Walker(layer, size)
    for position in positions:
        for name in tqdm(list(walkers), desc=f"to {position:,}", leave=False):
            try:
                problem = walkers[name].go(position, WALK_CAPS * cap_s)
            except Exception as error:
                problem = failure(error)
            if problem:
                lines[name].at[position] = Line(name, problem)
                del walkers[name]
        calls = {name: walker.call() for name, walker in walkers.items()}
        timings = interleave(calls, rounds, cap_s, ATTENTION)
        for name in calls:
            line = line_of(name, timings, ATTENTION)
            if line.step_ms is not None:
                line.step_ms /= size.chunk
            line.samples_ms = {i: ms / size.chunk for i, ms in line.samples_ms.items()}
            lines[name].at[position] = line
            if line.problem:
                del walkers[name]
    about = f"Milliseconds a token for {size.batch} sequences, the mean of {size.chunk} tokens; {clock_words()}."
    return Decoding(f"decoding, chunks of {size.chunk}", about, positions, list(lines.values()))
