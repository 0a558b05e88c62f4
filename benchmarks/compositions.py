"""Levels made of levels on tokens beside the sum of their parts, forward and backward, in one interleaved run.

python benchmarks/compositions.py            a table, as Markdown
python benchmarks/compositions.py --tiny     toy sizes: to see that all of it runs
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.func import vmap

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import describe
from benchmarks.timing import Call, interleave
from nestopt import chain, nest, parallel
from nestopt.core import Level, Signal
from nestopt.core.clock import start
from nestopt.core.gates import bind
from nestopt.core.memories import Mlp
from nestopt.core.objectives import Huber
from nestopt.levels import adam, deep_momentum, deltanet, gd, muon, omega, retnet, titans, ttt
from nestopt.ops import fast_form, run

CHUNK = 16
Work = Callable[[], object]
BY_CHUNK: dict[str, Any] = {"step_size": 0.01, "normalized": False, "write": "chunk", "read": "chunk", "chunk": CHUNK}
BY_TOKEN: dict[str, Any] = {"chunk": 1, "normalized": False, "lr": 0.1}


def tokens(level: Level, size: argparse.Namespace) -> Work:
    """The level over a sequence, and all gradients."""
    torch.manual_seed(0)
    shape = size.batch, size.tokens, size.heads, size.width
    q, k, v = (torch.nn.functional.normalize(torch.randn(shape), dim=-1).requires_grad_() for _ in range(3))
    learned = [level.learned_start(size.width, size.width) for _ in range(size.heads)]
    begun = {name: torch.stack([one[name] for one in learned]) for name in learned[0]}

    def work() -> object:
        return torch.autograd.grad(run(level, q, k, v, learned=begun)[0].square().sum(), (q, k, v))

    return work


def rule(level: Level, size: argparse.Namespace, steps: int) -> Work:
    """The rule alone: so many steps on gradients of the weights of as many memories as there are heads, and back."""
    torch.manual_seed(0)
    lead = size.batch, size.heads
    shapes = (size.width, 2 * size.width), (2 * size.width, size.width)  # of an mlp
    grads = [torch.randn(*lead, *shape).requires_grad_() for shape in shapes]

    def work() -> object:
        total = torch.zeros(())
        for grad in grads:
            state = vmap(vmap(lambda g: start(bind(level), g), randomness="different"), randomness="different")(grad)
            for n in range(steps):
                one = vmap(vmap(lambda g, s, n=n: bind(level).step(g, s, Signal(step=torch.tensor(n + 1)))))
                direction, state = one(grad, state)
                total = total + direction.square().sum()
        return torch.autograd.grad(total, grads)

    return work


@dataclasses.dataclass(frozen=True)
class Row:
    """A composition, what it is made of (each part with how often), and the tokens that all of them are run on."""

    name: str
    level: Level
    parts: dict[str, tuple[int, Work]]
    size: argparse.Namespace


def rows(size: argparse.Namespace) -> list[Row]:
    chunks = size.tokens // CHUNK
    few = argparse.Namespace(**{**vars(size), "tokens": size.tokens // 4})  # for what goes from token to token

    def of(**levels: Level) -> dict[str, tuple[int, Work]]:
        return {name: (1, tokens(level, size)) for name, level in levels.items()}

    both, chunked = {"retnet": retnet(), "deltanet": deltanet()}, of(titans=titans(read="chunk", chunk=CHUNK))
    one_by_one = tokens(ttt(**BY_TOKEN), few)
    adam_by_chunk, adam_by_token = (1, rule(adam(), size, chunks)), (1, rule(adam(), few, few.tokens))
    return [
        Row("parallel(retnet, deltanet)", parallel(*both.values()), of(**both), size),
        Row("chain(retnet, deltanet)", chain(*both.values()), of(**both), size),
        Row("nest(gd(period=64), deltanet)", nest(gd(period=64), deltanet()), of(deltanet=deltanet()), size),
        Row(
            "titans(rule=muon(), write='chunk')",
            titans(rule=muon(), **BY_CHUNK),
            {**chunked, "muon": (1, rule(muon(), size, chunks))},
            size,
        ),
        Row(
            "titans(rule=adam(), write='chunk')",
            titans(rule=adam(), **BY_CHUNK),
            {**chunked, "adam": adam_by_chunk},
            size,
        ),
        Row("deltanet(objective=huber)", deltanet(objective=Huber(0.5)), of(deltanet=deltanet()), size),
        Row("deep_momentum", deep_momentum(), {"ttt by token": (1, one_by_one), "adam": adam_by_token}, few),
        Row("omega(memory=mlp)", omega(memory=Mlp()), {"ttt by token": (4, one_by_one)}, few),
    ]


def line_of(row: Row, rounds: int) -> str:
    """Time a row and its parts, and write its line of the table."""
    calls = {row.name: Call(tokens(row.level, row.size), _nothing)}
    calls |= {name: Call(work, _nothing) for name, (_, work) in row.parts.items()}
    timings = interleave(calls, rounds, cap_s=60.0, reference=row.name)
    whole = timings[row.name]
    shares = [
        sum(count * timings[name].rounds[n] for name, (count, _) in row.parts.items()) / seconds
        for n, seconds in whole.rounds.items()
        if seconds and all(n in timings[name].rounds for name in row.parts)
    ]
    ratio = f"{1 / statistics.median(shares):.2f}" if shares and min(shares) else "–"
    total = sum(count * timings[name].step_s for name, (count, _) in row.parts.items())
    parts = " + ".join(
        f"{f'{count} × ' if count > 1 else ''}{name} {1e3 * timings[name].step_s:.1f}"
        for name, (count, _) in row.parts.items()
    )
    form = fast_form(row.level) or "reference"
    sums = f"{1e3 * total:.1f} ({parts})"
    return f"| `{row.name}` | {form} | {row.size.tokens:,} | {1e3 * whole.step_s:.1f} | {sums} | {ratio} |"


def _nothing() -> None:
    """Nothing is to be prepared."""


def main(given: Sequence[str] | None = None) -> list[str]:
    """Time every row and its parts, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("batch", 2), ("heads", 4), ("width", 32), ("tokens", 1024), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    parser.add_argument("--tiny", action="store_true", help="toy sizes: to see that all of it runs")
    size = parser.parse_args(given)
    if size.tiny:
        size.batch, size.heads, size.width, size.tokens, size.rounds = 1, 1, 4, 64, 1
    torch.set_num_threads(1)
    lines = [f"{key}: {value}" for key, value in describe().items()]
    lines += [f"batch {size.batch}, {size.heads} heads of {size.width}; forward and backward, process CPU time", ""]
    lines += [
        "| level | form | tokens | ms | sum of its parts, ms | ratio |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    print("\n".join(lines))
    for row in rows(size):
        lines.append(line_of(row, size.rounds))
        print(lines[-1], flush=True)
    return lines


if __name__ == "__main__":
    main()
