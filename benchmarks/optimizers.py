"""Optimizers of nestopt beside their peers and their floors; `README.md` beside this file says how to read it."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import dgd
from benchmarks.machine import Rates, describe, probe
from benchmarks.memory import held_bytes, in_fresh_process
from benchmarks.report import Line, Table, clock_words, line_of, plot, write, write_json
from benchmarks.rows import Missing, Parameters, Row, Stepper, reference, rows
from benchmarks.sets import SETS, shapes
from benchmarks.timing import Call, Timing, failure, interleave

DGD = "dgd"


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--set", nargs="+", choices=[*SETS, DGD], default=[*SETS, DGD], help="default: all")
    parser.add_argument("--threads", type=int, default=1, help="default 1: process CPU time; else wall time")
    parser.add_argument("--rounds", type=int, default=9, help="default 9")
    parser.add_argument("--only", metavar="REGEX", default="", help="rows to time besides the reference")
    parser.add_argument("--compiled", action="store_true", help="also the rows that compile their step")
    parser.add_argument("--memory", action="store_true", help="transient memory too: a fresh process a row (Linux)")
    parser.add_argument("--cap", type=float, default=30.0, metavar="S", help="timed seconds a row and set, default 30")
    parser.add_argument(
        "--quick",
        type=float,
        nargs="?",
        const=2.0,
        metavar="S",
        help="leave out rows whose floor or first step is over S seconds (default 2 if given)",
    )
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="the tables")
    parser.add_argument("--json", type=Path, metavar="FILE", help="everything, with each round's times")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a picture, such as optimizers.svg")
    parser.add_argument("--tiny", action="store_true", help="sets at toy size: to see that all of it runs")
    args = parser.parse_args(given)
    if min(args.threads, args.rounds) < 1:
        parser.error("--threads and --rounds must be 1 or more")
    try:
        re.compile(args.only)
    except re.error as error:
        parser.error(f"--only: {args.only!r} is no regular expression: {error}")
    return args


def main(given: Sequence[str] | None = None) -> list[Table]:
    """Time the sets, print their tables as they are done, and write the files that were asked for."""
    args = arguments(given)
    torch.set_num_threads(args.threads)
    machine, tables = describe(), []
    print(", ".join(f"{key}: {value}" for key, value in machine.items()))
    rates = _probe(args)
    for name in args.set:
        table = _time_dgd(args, rates) if name == DGD else _time_set(name, args, rates)
        tables.append(table)
        print(f"\n{table.markdown()}", flush=True)
        if args.markdown:
            write(args.markdown, "\n".join(table.markdown() for table in tables))
        if args.json:
            write_json(args.json, machine, tables)
    if args.plot:
        plot(args.plot, tables)
    return tables


def _probe(args: argparse.Namespace) -> Rates:
    return probe(64, 2**12, 0.01) if args.tiny else probe()


def _time_set(name: str, args: argparse.Namespace, rates: Rates) -> Table:
    wanted = reference(name, rates.native_bfloat16)
    chosen = [row for row in rows(name, args.compiled) if row.name == wanted or re.search(args.only, row.name)]
    sizes = shapes(name, args.tiny)
    entries = sum(torch.Size(shape).numel() for shape in sizes)
    calls: dict[str, Call] = {}
    built: dict[str, tuple[Parameters, Stepper]] = {}
    problems: dict[str, str] = {}
    for row in tqdm(chosen, desc="building", leave=False):
        least = max(row.work.floors_s(sizes, rates))
        if args.quick is not None and least > args.quick and row.name != wanted:
            problems[row.name] = f"left out: its floor is {least:.1f} s, over the {args.quick:g} s of --quick"
            continue
        parameters = Parameters(sizes)
        try:
            optimizer = row.build(parameters.tensors)
        except Missing as error:
            problems[row.name] = str(error)
            continue
        except Exception as error:
            problems[row.name] = failure(error)
            continue
        built[row.name] = parameters, optimizer
        calls[row.name] = Call(optimizer.step, parameters.fill, row.steps, row.warmups)
    if wanted not in calls:
        raise RuntimeError(f"{name}: the reference {wanted!r} can't run here: {problems[wanted]}")
    timings = _interleave(calls, wanted, args)
    rates = rates.best(_probe(args))
    lines = [_line(row, problems.get(row.name), timings, wanted) for row in chosen]
    for row, line in zip(chosen, lines, strict=True):
        moved, computed = row.work.floors_s(sizes, rates)
        line.bytes_ms, line.flops_ms = 1e3 * moved, 1e3 * computed
        if not line.problem:
            parameters, optimizer = built[row.name]
            gradients = [param.grad for param in parameters.tensors if param.grad is not None]
            line.state_bytes = held_bytes(optimizer, [*parameters.tensors, *gradients]) / entries
    if args.memory:
        built.clear()  # room for the processes that follow
        calls.clear()
        _measure_memory(name, lines, args)
    about = f"{SETS[name][0]}: {len(sizes):,} tensors, {entries / 1e6:.1f} M parameters"
    return _table(
        name, about if not args.tiny else f"toy size, times mean nothing: {len(sizes)} tensors", wanted, rates, lines
    )


def _interleave(calls: dict[str, Call], wanted: str, args: argparse.Namespace) -> dict[str, Timing]:
    above = float("inf") if args.quick is None else args.quick
    return interleave(calls, args.rounds, args.cap, wanted, above)


def _line(row: Row, problem: str | None, timings: dict[str, Timing], wanted: str) -> Line:
    if problem is not None:
        return Line(row.name, problem)
    return line_of(row.name, timings, wanted, row.peer)


def _measure_memory(name: str, lines: Sequence[Line], args: argparse.Namespace) -> None:
    with tqdm(lines, leave=False) as bar:
        for line in bar:
            bar.set_description_str(f"memory: {line.name}")
            if line.problem or line.step_ms is None:
                continue
            given = [name, line.name, str(args.threads), *["--tiny"] * args.tiny]
            try:
                # its steps, and a minute to start and to compile
                answer = in_fresh_process("benchmarks.step_memory", given, 60 + 40 * line.step_ms / 1e3)
            except RuntimeError as error:
                tqdm.write(f"memory of {line.name}: {error}")
                continue
            line.transient_mib = int(answer) / 2**20


def _time_dgd(args: argparse.Namespace, rates: Rates) -> Table:
    size = dgd.TINY if args.tiny else dgd.Size()
    lines: list[Line] = []
    calls, problems = dgd.calls(size)
    calls = {name: call for name, call in calls.items() if name == dgd.PLAIN or re.search(args.only, name)}
    timings = _interleave(calls, dgd.PLAIN, args)
    rates = rates.best(_probe(args))
    flops, moved = dgd.flops(size), dgd.step_bytes(size)
    for name in calls:
        line = line_of(name, timings, dgd.PLAIN)
        if name in flops:
            line.flops_ms = 1e3 * flops[name] / rates.flops_per_s["float32"]
        if name in moved:
            line.bytes_ms = 1e3 * moved[name] / rates.bytes_per_s
        lines.append(line)
    lines += [Line(name, problem) for name, problem in problems.items()]
    about = f"{size.layers} MLP blocks of width {size.width} on {size.tokens:,} tokens"
    return _table(DGD, about, dgd.PLAIN, rates, lines)


def _table(name: str, about: str, wanted: str, rates: Rates, lines: list[Line]) -> Table:
    flops = ", ".join(f"{rate / 1e9:.0f} GFLOP/s {dtype}" for dtype, rate in rates.flops_per_s.items())
    return Table(name, about, wanted, clock_words(), f"{rates.bytes_per_s / 1e9:.0f} GB/s and {flops}", lines)


if __name__ == "__main__":
    main()
