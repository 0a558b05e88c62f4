"""Memory of one call of a layer, in a process of its own: `python -m benchmarks.layer_memory ROW MODE TOKENS CHUNK`.

Prints bytes: the peak of resident memory above what the layer and its input take.
"""

from __future__ import annotations

import argparse
import os
import sys

import torch

from benchmarks.layer_rows import MODES, Row, build, rows
from benchmarks.layer_size import Size, tiny
from benchmarks.memory import forget_peak, in_fresh_process, peak_bytes, resident_bytes


def measure(row: Row, mode: str, size: Size, threads: int, limit_gib: float, timeout_s: float) -> int:
    """Bytes, from a fresh process.

    Raises:
        RuntimeError: it failed or took too long.
    """
    given = [row.name, mode, str(size.tokens), str(size.chunk), str(threads), str(limit_gib)]
    small = size == tiny(size.tokens, size.chunk)
    return int(in_fresh_process("benchmarks.layer_memory", [*given, *["--tiny"] * small], timeout_s))


def limit(gib: float) -> None:
    """Let allocations beyond so much address space fail, so that a layer that needs more is a row, not a dead machine.

    0 is no limit. Linux only: elsewhere there is none.
    """
    if gib and sys.platform == "linux":
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_AS)
        wanted = int(gib * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (wanted if most == resource.RLIM_INFINITY else min(wanted, most), most))


def default_limit_gib() -> float:
    """Three quarters of the machine's memory; 0 where it can't be asked for."""
    try:
        return 0.75 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (AttributeError, ValueError, OSError):
        return 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("row")
    parser.add_argument("mode", choices=MODES)
    parser.add_argument("tokens", type=int)
    parser.add_argument("chunk", type=int)
    parser.add_argument("threads", type=int)
    parser.add_argument("limit_gib", type=float)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    limit(args.limit_gib)
    row = next(row for row in rows() if row.name == args.row)
    make = tiny if args.tiny else Size
    # a short call first: what libraries load and keep is not the layer's
    build(row, make(args.chunk, args.chunk)).call(args.mode)
    layer = build(row, make(args.tokens, args.chunk))
    before = resident_bytes()
    forget_peak()
    layer.call(args.mode)
    print(max(0, peak_bytes() - before))


if __name__ == "__main__":
    main()
