"""The command: runs what is missing, and prints the tables or writes them where the documentation has them."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from benchmarks.optimizer_quality.cost import costs
from benchmarks.optimizer_quality.picture import draw
from benchmarks.optimizer_quality.problems import ON_DIGITS, PROBLEMS
from benchmarks.optimizer_quality.rows import ROWS
from benchmarks.optimizer_quality.sweep import (
    Found,
    Result,
    Run,
    append,
    append_cost,
    read,
    repeated,
    search,
    search_in_time,
    train,
)
from benchmarks.optimizer_quality.table import files, losses_table, outcomes
from benchmarks.report import write

REFERENCE = next(iter(ROWS))
"""The row whose time is the others' budget."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.optimizer_quality", description=__doc__)
    installed = [name for name, row in ROWS.items() if row.is_installed]
    has_digits = importlib.util.find_spec("sklearn") is not None
    possible = [name for name in PROBLEMS if has_digits or name not in ON_DIGITS]
    parser.add_argument("--problems", type=_names(PROBLEMS), default=possible, help="of " + ", ".join(PROBLEMS))
    parser.add_argument("--optimizers", type=_names(ROWS), default=installed, help="of " + "; ".join(ROWS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rates", type=int, default=3, help="how many rates each optimizer is given to begin with")
    parser.add_argument("--out", type=Path, default=Path("optimizer_quality.jsonl"), help="file of results")
    parser.add_argument(
        "--pages", type=Path, metavar="docs", help="run nothing: write the tables and the picture there"
    )
    given = parser.parse_args(arguments)
    if given.pages:
        known = outcomes(read(given.out), PROBLEMS, given.steps, given.rates, given.seeds)
        for path, text in files(known).items():
            write(given.pages / path, text)
        draw(given.pages / "_static" / "choosing.svg", known)
        return
    if absent := [name for name in given.optimizers if not ROWS[name].is_installed]:
        parser.error(f"not installed: {', '.join(f'{ROWS[name].needs} (for {name!r})' for name in absent)}")
    if absent := [name for name in given.problems if name not in possible]:
        parser.error(f"not installed: scikit-learn (for {', '.join(absent)})")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # seconds are of the process's CPU time
    try:
        for problem in given.problems:
            _measure(problem, given, read(given.out))
    finally:
        torch.set_num_threads(threads)
    known = outcomes(read(given.out), given.problems, given.steps, given.rates, given.seeds)
    print(losses_table(known, given.optimizers), losses_table(known, given.optimizers, in_time=True), sep="\n", end="")


def _measure(problem: str, given: argparse.Namespace, found: Found) -> None:
    """Make the runs of a problem that are missing, and time what was not timed."""

    def result(run: Run) -> Result:
        if run not in found.results:
            found.results[run] = train(run)
            append(given.out, run, found.results[run])
            print(f"{run} {found.results[run]}", file=sys.stderr)
        return found.results[run]

    if untimed := [name for name in given.optimizers if (problem, name) not in found.costs]:
        for name, cost in costs(problem, untimed, REFERENCE).items():
            if (problem, name) not in found.costs:
                found.costs[problem, name] = cost
                append_cost(given.out, problem, name, cost)
    for name in given.optimizers:
        best = search(Run(problem, name, given.steps, ROWS[name].middle), ROWS[name].own, given.rates, result)
        in_time = search_in_time(best, found.costs[problem, name], given.rates, result)
        for run in (*repeated(best, given.seeds), *repeated(in_time, given.seeds)):
            result(run)


def _names(known: Iterable[str]) -> type:
    """Return what reads names from a list with commas outside of parentheses."""
    allowed = list(known)

    def read(text: str) -> list[str]:
        names, rest = [], text
        while rest:
            name = max((name for name in allowed if rest == name or rest.startswith(name + ",")), key=len, default=None)
            if name is None:
                raise argparse.ArgumentTypeError(f"{rest!r} begins with none of {allowed}")
            names.append(name)
            rest = rest[len(name) + 1 :]
        return names

    return read  # type: ignore[return-value]


if __name__ == "__main__":
    main()
