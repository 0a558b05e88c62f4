"""Layers on tokens of nestopt beside their peers and their floors; `README.md` beside this file says how to read it."""

from __future__ import annotations

import argparse
import importlib.metadata
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import nestopt
from benchmarks.layer_blocks import ATTENTION, MLP
from benchmarks.layer_decode import POSITIONS, decode
from benchmarks.layer_growth import Times, growth, predicted_s
from benchmarks.layer_memory import default_limit_gib, limit, measure
from benchmarks.layer_peers import VERSIONS
from benchmarks.layer_rows import MODES, Layer, Row, build, rows
from benchmarks.layer_size import Size, tiny
from benchmarks.machine import Rates, describe, probe
from benchmarks.report import Line, Table, clock_words, line_of, write, write_json
from benchmarks.rows import Missing
from benchmarks.timing import Call, failure, interleave

REFERENCES = ATTENTION, MLP
TINY_POSITIONS = 8, 24


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seqs", type=int, nargs="+", default=[512, 2048, 4096, 16384], help="tokens a sequence")
    parser.add_argument("--chunks", type=int, nargs="+", default=[64, 16], help="tokens a chunk")
    parser.add_argument("--only", metavar="REGEX", default="", help="rows to time besides the attention block")
    parser.add_argument("--threads", type=int, default=1, help="default 1: process CPU time; else wall time")
    parser.add_argument("--rounds", type=int, default=5, help="default 5")
    parser.add_argument(
        "--cap", type=float, default=30.0, metavar="S", help="timed seconds a row, length and mode; default 30"
    )
    parser.add_argument(
        "--quick",
        type=float,
        nargs="?",
        const=2.0,
        metavar="S",
        help="leave out rows whose first call takes over S seconds (default 2 if given)",
    )
    parser.add_argument("--memory", action="store_true", help="peak memory too: a fresh process a row (Linux)")
    parser.add_argument("--decode", action="store_true", help="time of a token at positions 64 to 102,400 too")
    parser.add_argument(
        "--limit", type=float, default=default_limit_gib(), metavar="GIB", help="address space; default 3/4 of memory"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="the report, as Markdown")
    parser.add_argument("--json", type=Path, metavar="FILE", help="everything, with each round's times")
    parser.add_argument("--tiny", action="store_true", help="toy width: to see that all of it runs")
    args = parser.parse_args(given)
    if min(args.threads, args.rounds, *args.seqs, *args.chunks) < 1:
        parser.error("--threads, --rounds, --seqs and --chunks must be 1 or more")
    try:
        re.compile(args.only)
    except re.error as error:
        parser.error(f"--only: {args.only!r} is no regular expression: {error}")
    args.seqs = sorted(set(args.seqs))
    args.command = shlex.join(["python", "benchmarks/layers.py", *(sys.argv[1:] if given is None else given)])
    return args


def main(given: Sequence[str] | None = None) -> list[Any]:
    """Time all sizes, print their tables as they are done, and write the files that were asked for."""
    args = arguments(given)
    torch.set_num_threads(args.threads)
    limit(args.limit)
    machine = {**describe(), **versions(), "command": args.command}
    print("\n".join(f"{key}: {value}" for key, value in machine.items()))
    chosen = [row for row in rows() if row.name == ATTENTION or re.search(args.only, row.name)]
    tables: list[Any] = []

    def add(*made: Any) -> None:
        tables.extend(made)
        print("".join(f"\n{table.markdown()}" for table in made), flush=True)
        if args.out:
            write(args.out, report(machine, tables))
        if args.json:
            write_json(args.json, machine, tables)

    rates, times, failed = _probe(args), Times(), {}
    make = tiny if args.tiny else Size
    for i, chunk in enumerate(args.chunks):
        some = [row for row in chosen if row.chunked or row.name in REFERENCES or i == 0]
        for tokens in args.seqs:
            made, rates = _time_size(some, make(tokens, chunk), args, rates, times, failed)
            add(*made)
        add(growth(chunk, times))
        if args.decode:
            positions = TINY_POSITIONS if args.tiny else POSITIONS
            add(decode(some, make(chunk, chunk), args.rounds, args.cap, positions))
    return tables


def versions() -> dict[str, str]:
    """Of nestopt and of the peers that are installed."""
    found = {"nestopt": nestopt.__version__}
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def report(machine: dict[str, Any], tables: Sequence[Any]) -> str:
    lines = ["# Layers on tokens", "", *(f"- {key}: {value}" for key, value in machine.items()), ""]
    return "\n".join([*lines, *(table.markdown() for table in tables)])


def _probe(args: argparse.Namespace) -> Rates:
    return probe(64, 2**12, 0.01) if args.tiny else probe()


Failed = dict[tuple[str, int, str], str]
"""Why a row was not timed at a shorter length, by (row, chunk, mode)."""


def _time_size(
    chosen: Sequence[Row], size: Size, args: argparse.Namespace, rates: Rates, times: Times, failed: Failed
) -> tuple[list[Table], Rates]:
    """The tables of a size, a mode each, and the rates as they are known after it."""
    layers, problems = _build(chosen, size, args, times, failed)
    found = {mode: _time_mode(chosen, layers, problems[mode], size, mode, args) for mode in MODES}
    rates = rates.best(_probe(args))
    tried = set(layers)
    layers.clear()  # room for the processes that follow
    for mode, lines in found.items():
        for row, line in zip(chosen, lines, strict=True):
            key = row.name, size.chunk, mode
            line.flops_ms = 1e3 * row.floors_s(size, rates)[MODES.index(mode)]
            if line.problem and row.name in tried and row.name not in problems[mode]:
                failed.setdefault(key, f"{size.tokens:,} tokens: {line.problem}")
            elif not line.problem and line.step_ms is not None:
                times.setdefault(key, {})[size.tokens] = line.step_ms / 1e3
        if args.memory:
            _measure_memory(chosen, lines, size, mode, args)
    flops = f"{rates.flops_per_s['float32'] / 1e9:.0f} GFLOP/s float32"
    about = f"{size.batch} sequences, width {size.dim}" if not args.tiny else "toy width, times mean nothing"
    return [
        Table(f"{mode}, {size.words()}", about, ATTENTION, clock_words(), flops, lines) for mode, lines in found.items()
    ], rates


def _build(
    chosen: Sequence[Row], size: Size, args: argparse.Namespace, times: Times, failed: Failed
) -> tuple[dict[str, Layer], dict[str, dict[str, str]]]:
    """The layers that are to be timed in some mode, and by mode why the others are not."""
    layers: dict[str, Layer] = {}
    problems: dict[str, dict[str, str]] = {mode: {} for mode in MODES}
    above = min(args.cap, args.quick or args.cap)
    for row in tqdm(chosen, desc="building", leave=False):
        for mode in MODES:
            key = row.name, size.chunk, mode
            expected = predicted_s(times.get(key, {}), size.tokens)
            if key in failed:
                problems[mode][row.name] = f"not tried, since at {failed[key]}"
            elif expected > above and row.name != ATTENTION:
                problems[mode][row.name] = f"left out: a call should take about {expected:.0f} s, over {above:g} s"
        if all(row.name in found for found in problems.values()):
            continue
        try:
            layers[row.name] = build(row, size)
        except Missing as error:
            problems |= {mode: {**found, row.name: str(error)} for mode, found in problems.items()}
        except Exception as error:
            problems |= {mode: {**found, row.name: failure(error)} for mode, found in problems.items()}
    return layers, problems


def _time_mode(
    chosen: Sequence[Row],
    layers: dict[str, Layer],
    problems: dict[str, str],
    size: Size,
    mode: str,
    args: argparse.Namespace,
) -> list[Line]:
    able = {name: layer for name, layer in layers.items() if name not in problems}
    if ATTENTION not in able:
        raise RuntimeError(f"the reference {ATTENTION!r} can't run here: {problems[ATTENTION]}")
    calls = {name: Call(layer.runs[mode], layer.prepare) for name, layer in able.items()}
    above = float("inf") if args.quick is None else args.quick
    timings = interleave(calls, args.rounds, args.cap, ATTENTION, above)
    lines = []
    for row in chosen:
        if row.name in problems:
            lines.append(Line(row.name, problems[row.name]))
            continue
        line = line_of(row.name, timings, ATTENTION, row.peer)
        if not line.problem:
            line.finite = able[row.name].finite()
        able[row.name].prepare()  # lets go of the gradients
        lines.append(line)
    return lines


def _measure_memory(
    chosen: Sequence[Row], lines: Sequence[Line], size: Size, mode: str, args: argparse.Namespace
) -> None:
    with tqdm(list(zip(chosen, lines, strict=True)), leave=False) as bar:
        for row, line in bar:
            bar.set_description_str(f"memory: {row.name}")
            if line.problem or line.step_ms is None:
                continue
            try:
                # a call, and a minute to start
                timeout = 60 + 5 * line.step_ms / 1e3
                line.transient_mib = measure(row, mode, size, args.threads, args.limit, timeout) / 2**20
            except RuntimeError as error:
                tqdm.write(f"memory of {row.name}: {error}")


if __name__ == "__main__":
    main()
