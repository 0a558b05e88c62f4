"""What a step of the optimizer takes where each process steps everything, and where it steps what it owns.

    python benchmarks/distributed.py --markdown distributed.md

Processes on one machine, one thread each, talking by gloo. In the first way all have whole tensors and gradients, as
under DDP; in the second each has a slice of every tensor, as under ZeRO 1 to 3 and FSDP2: slices go to the tensors'
owners, are stepped there, and come back, which is in the time. Times are wall time from all processes' start to the
last one's end; the ways take turns, and a ratio is the median over rounds of one way's time by the other's.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import socket
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from tqdm import tqdm

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.machine import describe
from nestopt.core.tree import leaves
from nestopt.optim import Nested
from nestopt.optim.sharded.owners import imbalance, owners, step_cost
from nestopt.optim.sharded.slices import Slice
from nestopt.optim.sharded.units import Flat, Owned, Unit, Whole

SETS: dict[str, list[tuple[int, int]]] = {
    "24 of 512×512": [(512, 512)] * 24,
    "6 blocks of width 384": [(384, 384)] * 24 + [(1536, 384), (384, 1536)] * 6,
    "tiny": [(24, 24)] * 3 + [(32, 16)],
}
LEVELS: dict[str, Any] = {
    "muon": {"level": "muon", "dtype": "float32"},
    "m3": {"level": "m3", "dtype": "float32", "slow_period": 4},
    "adamw": "adamw",
}
WHOLE, OWNED = "each steps all", "each its own"


@dataclasses.dataclass
class Row:
    """A level on a set of tensors.

    Attributes:
        replicated_ms, owned_ms: a step, the median over rounds.
        ratio: of owned by replicated, the median over rounds.
        state: bytes of state of the process that has most, each way.
        sent: bytes that a process sends in a step.
        imbalance: how much the most loaded owner has to do, of the mean over all.
    """

    level: str
    tensors: str
    replicated_ms: float
    owned_ms: float
    ratio: float
    state: tuple[int, int]
    sent: int
    imbalance: float


def measure(level: str, tensors: str, rounds: int) -> Row:
    """One row; in all processes together."""
    shapes = {f"w{i}": shape for i, shape in enumerate(SETS[tensors])}
    torch.manual_seed(0)
    values = {name: torch.randn(shape) for name, shape in shapes.items()}
    grads = {name: torch.randn(shape) for name, shape in shapes.items()}
    nested = Nested([{"params": [(n, nn.Parameter(v.clone())) for n, v in values.items()], "stack": LEVELS[level]}])
    (group,) = nested.param_groups
    rank, world = dist.get_rank(), dist.get_world_size()
    tables = [
        [_slice(name, shape, i, r, world) for i, (name, shape) in enumerate(shapes.items())] for r in range(world)
    ]
    slices = [values[piece.name].flatten()[piece.start : piece.start + piece.size].clone() for piece in tables[rank]]
    sliced = [grads[piece.name].flatten()[piece.start : piece.start + piece.size].clone() for piece in tables[rank]]
    whole = Whole(nested, group, list(shapes), [nn.Parameter(v) for v in values.values()], seed=0)
    costs = {name: step_cost(nested.level(group), torch.Size(shape)) for name, shape in shapes.items()}
    owner = owners(costs, world)
    own: Unit
    if nested.level(group).is_elementwise:
        own = Flat(nested, group, slices, tables[rank])
    else:
        own = Owned(nested, group, slices, tables, owner, dist.group.WORLD, seed=0)
    ways: dict[str, tuple[Unit, list[Tensor]]] = {WHOLE: (whole, list(grads.values())), OWNED: (own, sliced)}
    times: dict[str, list[float]] = {name: [] for name in ways}
    # m3's slow memory is read at every fourth step: a sample is as many steps
    steps = 4
    for i in tqdm(range(rounds + 1), desc=f"{level}, {tensors}", leave=False, disable=rank != 0):
        for name in list(ways)[:: 1 if i % 2 else -1]:
            unit, gradients = ways[name]
            dist.barrier()
            begin = time.perf_counter()
            for _ in range(steps):
                unit.step(gradients, group, {})
            took = torch.tensor((time.perf_counter() - begin) / steps)
            dist.all_reduce(took, dist.ReduceOp.MAX)
            if i:  # the first makes the states
                times[name].append(1e3 * float(took))
    ratios = [b / a for a, b in zip(times[WHOLE], times[OWNED], strict=True)]
    sent = sum(part.exchange.sent for part in own.rounds) if isinstance(own, Owned) else 0
    numbers = torch.tensor([_state(whole), _state(own), sent])
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return Row(
        level,
        tensors,
        statistics.median(times[WHOLE]),
        statistics.median(times[OWNED]),
        statistics.median(ratios),
        (int(numbers[0]), int(numbers[1])),
        4 * int(numbers[2]),
        imbalance(costs, owner, world) if isinstance(own, Owned) else 1.0,
    )


def _slice(name: str, shape: tuple[int, int], place: int, rank: int, world: int) -> Slice:
    numel = shape[0] * shape[1]
    size = -(-numel // world)
    start = min(rank * size, numel)
    return Slice(name, shape, start, min(size, numel - start), place)


def _state(unit: Unit) -> int:
    return sum(
        leaf.numel() * leaf.element_size()
        for nested in unit.inner()
        for state in nested.state.values()
        for _, leaf in leaves(dict(state))
    )


def work(rank: int, world: int, port: int, chosen: list[tuple[str, str]], rounds: int, path: str) -> None:
    """All rows, in one of the processes."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo")
    rows = [dataclasses.asdict(measure(level, tensors, rounds)) for level, tensors in chosen]
    if rank == 0:
        Path(path).write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def table(rows: Sequence[Row], world: int) -> str:
    """As Markdown."""
    machine = describe()
    where = f"{machine['cpu']}, {machine['instructions']}, torch {machine['torch']}"
    lines = [
        f"{world} processes, one thread each, gloo; {where}",
        "",
        f"| level | tensors | {WHOLE}, ms | {OWNED}, ms | ratio | state of a process, MB | sent, MB | max/mean |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        state = " → ".join(f"{size / 1e6:.1f}" for size in row.state)
        lines.append(
            f"| {row.level} | {row.tensors} | {row.replicated_ms:.1f} | {row.owned_ms:.1f} | {row.ratio:.2f} | "
            f"{state} | {row.sent / 1e6:.1f} | {row.imbalance:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--set", nargs="+", choices=SETS, default=[name for name in SETS if name != "tiny"])
    parser.add_argument("--level", nargs="+", choices=LEVELS, default=list(LEVELS))
    parser.add_argument("--markdown", metavar="FILE")
    args = parser.parse_args(argv)
    chosen = [(level, tensors) for tensors in args.set for level in args.level]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "rows.json")
        mp.spawn(work, (args.processes, port, chosen, args.rounds, path), nprocs=args.processes)
        rows = [Row(**{**row, "state": tuple(row["state"])}) for row in json.loads(Path(path).read_text())]
    text = table(rows, args.processes)
    print(text, end="")
    if args.markdown:
        Path(args.markdown).write_text(text)
    return rows


if __name__ == "__main__":
    main()
