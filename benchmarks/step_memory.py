"""Transient memory of one step, in a process of its own: `python -m benchmarks.step_memory SET ROW THREADS`.

Prints bytes: the peak of the steps after the first, above what was resident before them, so what the first step made to
stay is not in it. As many steps as make one sample, so that a slow step among them counts.
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.memory import forget_peak, peak_bytes, resident_bytes
from benchmarks.rows import Parameters, rows
from benchmarks.sets import shapes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("set")
    parser.add_argument("row")
    parser.add_argument("threads", type=int)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    row = next(row for row in rows(args.set, compiled=True) if row.name == args.row)
    parameters = Parameters(shapes(args.set, args.tiny))
    optimizer = row.build(parameters.tensors)
    for _ in range(row.warmups):
        optimizer.step()
        parameters.fill()
    before = resident_bytes()
    forget_peak()
    for _ in range(row.steps):
        optimizer.step()
        parameters.fill()
    print(max(0, peak_bytes() - before))


if __name__ == "__main__":
    main()
