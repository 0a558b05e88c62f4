"""The numbers of a forgetting report, as a table, plain data and a picture."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from nestopt.evidence.measures import Line, Look, Mean


@dataclasses.dataclass(frozen=True)
class ForgettingReport:
    """What learning while reading gives, and how long it is kept.

    Attributes:
        documents: how many.
        size: bytes of each.
        times: new text that was read before each of `Line.gain`, in documents.
        positions: the middle of each part of a document over which `Look.curve` is a mean, in bytes.
        learning: the line in which all memories are written.
        mixer: the line in which only the mixers' are.
    """

    documents: int
    size: int
    times: tuple[int, ...]
    positions: tuple[float, ...]
    learning: Line
    mixer: Line

    def table(self) -> str:
        """Return the report as text."""
        lines = (self.learning, self.mixer)
        looks: list[tuple[str, list[object]]] = [
            ("first look", [line.first.whole for line in lines]),
            ("second look", [line.second.whole for line in lines]),
            ("gained", [line.again for line in lines]),
            ("new text", [f"{line.new:.3f}" for line in lines]),
            ("bytes a second", [f"{line.speed:,.0f}" for line in lines]),
        ]
        gains: list[tuple[str, list[object]]] = [
            (f"{times:,} x", [line.gain[i] for line in lines]) for i, times in enumerate(self.times)
        ]
        return "\n".join(
            [
                f"{self.documents} documents of {self.size:,} bytes; bits per byte, mean ± standard error",
                "",
                *_rows("", looks),
                "",
                "what is still gained on a document after so much new text, in documents",
                *_rows("new text", gains),
            ]
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, as JSON takes it; numbers that are not finite are None."""
        found = _plain(dataclasses.asdict(self))
        assert isinstance(found, dict)
        return found

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ForgettingReport:
        """Return the report that `to_dict` gave."""
        return cls(
            data["documents"],
            data["size"],
            tuple(data["times"]),
            tuple(data["positions"]),
            _line(data["learning"]),
            _line(data["mixer"]),
        )

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw it; the suffix of `path` says which kind of picture (`.png`, `.svg`, `.pdf`). Replaces it at once."""
        from nestopt.evidence.plot import plot

        plot(self.learning, self.mixer, self.positions, self.times, path)


def _rows(corner: str, rows: Sequence[tuple[str, list[object]]]) -> list[str]:
    cells = [(corner, "learning", "mixers only"), *((name, *map(str, found)) for name, found in rows)]
    return [f"{name:<16}{left:>16}{right:>16}" for name, left, right in cells]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(child) for key, child in value.items()}
    if isinstance(value, tuple):
        return [_plain(child) for child in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _mean(data: Mapping[str, Any]) -> Mean:
    return Mean(_number(data["mean"]), _number(data["error"]))


def _means(data: Sequence[Mapping[str, Any]]) -> tuple[Mean, ...]:
    return tuple(map(_mean, data))


def _line(data: Mapping[str, Any]) -> Line:
    first, second = (Look(_mean(look["whole"]), _means(look["curve"])) for look in (data["first"], data["second"]))
    seen, unseen, gain = (_means(data[key]) for key in ("seen", "unseen", "gain"))
    return Line(first, second, _mean(data["again"]), seen, unseen, gain, _number(data["new"]), _number(data["speed"]))
