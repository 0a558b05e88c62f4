"""The command: runs what is missing, and prints the table."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from benchmarks.optimizer_quality.problems import ON_DIGITS, PROBLEMS
from benchmarks.optimizer_quality.rows import ROWS
from benchmarks.optimizer_quality.sweep import append, planned, read, train
from benchmarks.optimizer_quality.table import table


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.optimizer_quality", description=__doc__)
    installed = [name for name, row in ROWS.items() if row.is_installed]
    has_digits = importlib.util.find_spec("sklearn") is not None
    possible = [name for name in PROBLEMS if has_digits or name not in ON_DIGITS]
    parser.add_argument("--problems", type=_names(PROBLEMS), default=possible, help="of " + ", ".join(PROBLEMS))
    parser.add_argument("--optimizers", type=_names(ROWS), default=installed, help="of " + "; ".join(ROWS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rates", type=int, default=7, help="how many rates each optimizer is given")
    parser.add_argument("--out", type=Path, default=Path("optimizer_quality.jsonl"), help="file of results")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    if absent := [name for name in given.optimizers if not ROWS[name].is_installed]:
        parser.error(f"not installed: {', '.join(f'{ROWS[name].needs} (for {name!r})' for name in absent)}")
    if absent := [name for name in given.problems if name not in possible]:
        parser.error(f"not installed: scikit-learn (for {', '.join(absent)})")
    runs = list(planned(given.problems, given.optimizers, given.steps, given.rates, given.seeds))
    results = read(given.out)
    missing = [run for run in runs if run not in results]
    for i, run in enumerate(missing, start=1):
        results[run] = train(run)
        append(given.out, run, results[run])
        print(f"{i}/{len(missing)} {run} {results[run]}", file=sys.stderr)
    print(table({run: results[run] for run in runs}, given.problems, given.optimizers), end="")


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
