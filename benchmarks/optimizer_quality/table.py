"""The results as a table of Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from statistics import fmean, stdev

from benchmarks.optimizer_quality.sweep import Result, Run


def best(results: Mapping[Run, Result]) -> tuple[float, list[Result]]:
    """Return the rate with the least mean loss over seeds, and its results."""
    by_rate: dict[float, list[Result]] = {}
    for run, result in sorted(results.items()):
        by_rate.setdefault(run.rate, []).append(result)
    return min(by_rate.items(), key=lambda item: fmean(result.loss for result in item[1]))


def cell(results: Mapping[Run, Result]) -> list[str]:
    """Return loss, training loss, rate and time a step of the best rate of one optimizer on one problem."""
    rate, found = best(results)
    losses = [result.loss for result in found]
    if not all(map(math.isfinite, losses)):
        return ["diverges", "", f"{rate:g}", ""]
    tried, steps = {run.rate for run in results}, next(iter(results)).steps
    edge = " (edge)" if len(tried) > 1 and rate in (min(tried), max(tried)) else ""
    spread = f" ± {stdev(losses):.3f}" if len(losses) > 1 else ""
    milliseconds = 1000 * fmean(result.seconds for result in found) / steps
    return [
        f"{fmean(losses):.3f}{spread}",
        f"{fmean(result.train for result in found):.3f}",
        f"{rate:g}{edge}",
        f"{milliseconds:.1f}",
    ]


def table(results: Mapping[Run, Result], problems: Iterable[str], optimizers: Iterable[str]) -> str:
    """Return a table for each problem, best optimizers first."""
    optimizers, parts = list(optimizers), []
    for problem in problems:
        rows = []
        for optimizer in optimizers:
            own = {r: result for r, result in results.items() if (r.problem, r.optimizer) == (problem, optimizer)}
            if own:
                mean = fmean(result.loss for result in best(own)[1])
                rows.append((mean, f"| {optimizer} | {' | '.join(cell(own))} |"))
        lines = [f"| {problem} | held-out loss | training loss | rate | ms a step |", "| --- " * 5 + "|"]
        parts.append("\n".join([*lines, *(line for _, line in sorted(rows))]))
    return "\n\n".join(parts) + "\n"
