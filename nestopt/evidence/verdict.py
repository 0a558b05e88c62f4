"""What measured rows say of a claim: yes, no or undecided, by a rule that is the same for all."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

Answer = Literal["yes", "no", "undecided"]
Row = Mapping[str, Any]

LEAST = 3
"""Seeds, without which nothing is decided."""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Of a claim.

    Attributes:
        answer: whether it is so.
        rule: by which this was found, and on what.
        seeds: how many.
    """

    answer: Answer
    rule: str
    seeds: int

    def __str__(self) -> str:
        enough = f", and {LEAST} are needed" if self.seeds < LEAST else ""
        return f"verdict: {self.answer} ({self.rule}; {self.seeds} {'seed' if self.seeds == 1 else 'seeds'}{enough})"


def above(differences: Sequence[float]) -> Answer:
    """Return whether paired differences are above 0: all seeds agree, and the mean is beyond two standard errors."""
    if len(differences) < LEAST:
        return "undecided"
    mean, error = mean_and_error(differences)
    if abs(mean) <= 2 * error or mean == 0 or any(d * mean <= 0 for d in differences):
        return "undecided"
    return "yes" if mean > 0 else "no"


def not_below(differences: Sequence[float]) -> Answer:
    """Return whether paired differences are 0 or above, within two standard errors."""
    if len(differences) < LEAST:
        return "undecided"
    mean, error = mean_and_error(differences)
    return "yes" if mean >= -2 * error else "no"


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error, s / √n."""
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def scores(rows: Iterable[Row], part: str, **same: object) -> dict[int, float]:
    """Return by seed the score on `part` of the rows that have these values, such as `model="hope"`."""
    return {row["seed"]: row["scores"][part] for row in rows if all(row[key] == is_ for key, is_ in same.items())}


def of_pairs(
    rows: Sequence[Row],
    ours: str,
    others: Callable[[str, str], Sequence[str]],
    part: str,
    judge: Callable[[Sequence[float]], Answer],
) -> list[tuple[str, Answer]]:
    """Judge one model against others, on each task and at each limit, by the differences of the same seed.

    Args:
        rows: of a claim.
        ours: whose scores are to be greater.
        others: by task and limit, the names of the others.
        part: of the score.
        judge: of differences.

    Returns:
        Of each pair what was compared, in words, and what was found.
    """
    found = []
    for task, limit in dict.fromkeys((row["task"], row["limit"]) for row in rows):
        own = scores(rows, part, model=ours, task=task, limit=limit)
        for other in others(task, limit):
            theirs = scores(rows, part, model=other, task=task, limit=limit)
            differences = [own[seed] - theirs[seed] for seed in own if seed in theirs]
            if not differences:
                continue
            mean, error = mean_and_error(differences)
            spread = "" if math.isnan(error) else f" ± {error:.3f}"
            found.append((f"{task}, {limit}: {ours} - {other} = {mean:+.3f}{spread}", judge(differences)))
    return found


def together(answers: Iterable[Answer]) -> Answer:
    """Return yes if all are, no if one is."""
    found = set(answers)
    return "no" if "no" in found else "undecided" if "undecided" in found or not found else "yes"


def seeds_of(rows: Iterable[Row]) -> int:
    """Return how many seeds all of the rows' models have been trained with."""
    by: dict[tuple[object, ...], set[int]] = {}
    for row in rows:
        by.setdefault((row["task"], row["model"], row["limit"]), set()).add(row["seed"])
    return min(map(len, by.values()), default=0)
