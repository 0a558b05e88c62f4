"""What each part of Hope earns: examples/hope.yaml with its parts off in turn, at equal tokens and equal time."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch.nn.functional as F

from benchmarks.machine import describe
from benchmarks.report import grid, write
from benchmarks.timing import Call, Timing, interleave, ratio
from nestopt.config import Config, ModelConfig, load
from nestopt.levels.self_modifying.level import SelfModifying
from nestopt.models import build_model
from nestopt.optim import optimizer
from nestopt.train.compare import like, parameters
from nestopt.train.data.text import held_out_text
from nestopt.train.evaluate import stream_bits_per_byte
from nestopt.train.loop import train

TRANSFORMER, WHOLE = "Transformer", "Hope"
HOPE = Path(__file__).parents[1] / "examples" / "hope.yaml"
MEMORIES = ("k", "v", "q", "eta", "alpha")


@dataclasses.dataclass
class Row:
    """One model.

    Attributes:
        name: what it is.
        model: how it is built.
        parameters: how many.
        step: of a training step.
        slowdown: a step's time by the Transformer's.
        tokens, seconds: bits per byte as it reads held-out text with its MLPs learning, and without, after equal steps
            and after as many as fit in the Transformer's time. None: not run.
    """

    name: str
    model: ModelConfig
    parameters: int
    step: Timing = dataclasses.field(default_factory=Timing)
    slowdown: float = float("nan")
    steps: tuple[int, int] = (0, 0)
    tokens: tuple[float, float] | None = None
    seconds: tuple[float, float] | None = None


def variants(config: Config) -> list[Row]:
    """The Transformer of as many parameters, and Hope with all six memories, each switched off, and without any."""
    section = config.model
    found = {TRANSFORMER: like(config, "transformer").model}
    for name, change in _changes(section).items():
        mixers = [change(level) if isinstance(level, SelfModifying) else level for level in section.mixers]
        found[name] = section.model_copy(update={"mixers": mixers})
    return [Row(name, model, parameters(model)) for name, model in found.items()]


def _changes(section: ModelConfig) -> Mapping[str, Any]:
    other = next(level for level in section.mixers if not isinstance(level, SelfModifying))

    def adaptive(*names: str) -> Any:
        return lambda level: dataclasses.replace(level, adaptive=names)

    changes = {WHOLE: lambda level: level, "all six memories": adaptive(*MEMORIES)}
    changes |= {f"without {name}": adaptive(*(n for n in MEMORIES if n != name)) for name in MEMORIES}
    changes |= {"only the memory that answers": adaptive(), "attention in their place": lambda level: other}
    return changes


def step_call(config: Config, model: ModelConfig) -> Call:
    """A training step of `model`, as `nestopt train` takes it."""
    built = build_model(model)
    tokens = torch.randint(model.vocab, (config.data.batch, config.data.window + 1))
    steps = optimizer(built, config)

    def run() -> None:
        logits, _ = built(tokens[:, :-1], learn="mixer")
        F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        steps.step()
        steps.zero_grad()

    return Call(run, lambda: None, steps=3)


def trained(config: Config, row: Row, steps: int, folder: str) -> tuple[float, float]:
    """Bits per byte with MLPs that learn as they read, and without, after `steps` of training."""
    settings = config.train.model_copy(
        update={"steps": steps, "seconds": None, "eval_every": 0, "save_every": 0, "sample_bytes": 0, "out": folder}
    )
    run = config.model_copy(update={"model": row.model, "train": settings})
    result = train(run, quiet=True)
    learning = result.bits_per_byte
    assert learning is not None
    model = result.run.load_model()
    corpus = config.data.dataset.load()
    text = torch.from_numpy(held_out_text(corpus.held_out, config.train.final_bytes))
    still = stream_bits_per_byte(
        model, text, streams=config.train.eval_streams, piece=config.data.window, learn="mixer"
    )
    return learning, still


def table(rows: Sequence[Row]) -> str:
    """As Markdown."""
    head = ["", "parameters", "step, ms", "× Transformer", "equal steps", "MLPs still", "steps", "equal time", "still"]
    cells = [head]
    for row in rows:
        line = [row.name, f"{row.parameters:,}", f"{row.step.step_s * 1e3:.0f}", f"{row.slowdown:.2f}"]
        for found, steps in ((row.tokens, None), (row.seconds, row.steps[1])):
            line += [] if steps is None else [f"{steps:,}"]
            line += ["–", "–"] if found is None else [f"{value:.3f}" for value in found]
        cells.append(line)
    return "\n".join(grid(cells))


def main(given: Sequence[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=600, help="of every model, at equal tokens (default 600)")
    parser.add_argument("--time", type=int, default=0, help="at equal time: the Transformer's steps; 0: not run")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="besides the Transformer")
    parser.add_argument("--bytes", type=int, default=65536, help="held-out bytes (default 65,536)")
    parser.add_argument("--rounds", type=int, default=5, help="of the timing (default 5)")
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="of the config")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the report, as Markdown")
    parser.add_argument("--json", type=Path, metavar="FILE", help="everything")
    args = parser.parse_args(given)
    torch.set_num_threads(1)
    config = load(HOPE, args.set)
    assert isinstance(config, Config)
    config.train.final_bytes, config.train.threads = args.bytes, 1
    rows = [row for row in variants(config) if not args.only or row.name in (TRANSFORMER, *args.only)]
    command = shlex.join(["python", "benchmarks/hope.py", *(sys.argv[1:] if given is None else given)])
    machine = {**describe(), "command": command}
    print("\n".join(f"{key}: {value}" for key, value in machine.items()), flush=True)
    timed = interleave({row.name: step_call(config, row.model) for row in rows}, args.rounds, 60.0, TRANSFORMER)
    for row in rows:
        row.step = timed[row.name]
        found = ratio(row.step, timed[TRANSFORMER])
        assert found is not None
        row.slowdown = found.median
        row.steps = args.steps, round(args.time / row.slowdown)
    with tempfile.TemporaryDirectory() as folder:
        for row in rows:
            row.tokens = trained(config, row, row.steps[0], folder)
            row.seconds = trained(config, row, row.steps[1], folder) if args.time else None
            print(table(rows[: rows.index(row) + 1]), flush=True)
    if args.out:
        write(args.out, f"{table(rows)}\n")
    if args.json:
        found = [{**dataclasses.asdict(row), "model": row.model.model_dump()} for row in rows]
        write(args.json, json.dumps({"machine": machine, "rows": found}, indent=1, ensure_ascii=False) + "\n")
    return rows


if __name__ == "__main__":
    main()
