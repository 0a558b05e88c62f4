"""What memories recall: after one pass over random pairs, untrained, and on MQAR after a short training.

One pass: N pairs of unit random keys and values of D numbers each are written once, and all keys are asked for. Printed
are the squared error, of values of length 1, and the share of keys whose nearest value is theirs.

MQAR (Arora et al. 2023): a sequence has N pairs of a key and a value, and then keys, each of which is to be answered
with its value. Printed is the share of right answers on new sequences, by seed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
import yaml

import nestopt
from nestopt.core.level import Level
from nestopt.models import HopeLM
from nestopt.train.data.tasks.recall import Mqar


def levels(chunk: int) -> dict[str, Level]:
    """What is compared, by name: gates stand where they start."""
    names = {"ttt": nestopt.levels.ttt, "titans": nestopt.levels.titans, "dla": nestopt.levels.dla}
    found: dict[str, Level] = {"deltanet": nestopt.levels.deltanet(), "deltanet, lr 1": nestopt.levels.deltanet(lr=1.0)}
    for name, make in names.items():
        found[name] = make(chunk=chunk)
        found[f"{name}, lr 1"] = make(chunk=chunk, lr=1.0)
    return found


# -- one pass ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def one_pass(level: Level, pairs: int, dim: int, batch: int = 64) -> tuple[float, float]:
    """The squared error and the share of nearest values that are right, of keys asked for after all is written."""
    torch.manual_seed(1)
    k, v = (F.normalize(torch.randn(batch, pairs, 1, dim, dtype=torch.float64), dim=-1) for _ in range(2))
    learned = level.learned_start(dim, dim)
    starts = {name: torch.randn(1, *w.shape, dtype=torch.float64) * w.std() for name, w in learned.items()}
    _, state = nestopt.ops.run(level, k, k, v, learned=starts)
    y, _ = nestopt.ops.run(level, k, k, v, state=state, learn=False)
    right = (y[:, :, 0] @ v[:, :, 0].mT).argmax(-1) == torch.arange(pairs)
    return float((y - v).square().sum(-1).mean()), float(right.double().mean())


# -- MQAR --------------------------------------------------------------------------------------------------------------


BATCH, DIM, BLOCKS, HEADS, LR = 64, 64, 2, 2, 3e-3


def train(level: Level, task: Mqar, steps: int, seed: int) -> tuple[float, float]:
    """The share of right answers after so many steps, and the CPU seconds that these took."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = HopeLM(task.vocab, DIM, BLOCKS, HEADS, mixer=level)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    begun = time.process_time()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1.0, (step + 1) / 20)
        examples = task.draw(BATCH, generator)
        loss, _ = model.loss(examples.tokens, targets=examples.targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    taken, right = time.process_time() - begun, []
    with torch.no_grad():
        for _ in range(8):
            examples = task.draw(BATCH, generator)
            right.append(task.score(model(examples.tokens)[0], examples).mean())
    return float(torch.stack(right).mean()), taken


def table(head: Sequence[str], rows: Callable[[], object]) -> None:
    print(f"| {' | '.join(head)} |\n|{' --- |' * len(head)}", flush=True)
    rows()
    print()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chunks", type=int, nargs="*", default=[1, 16, 64])
    parser.add_argument("--steps", type=int, default=200, help="of MQAR; 0 leaves it out")
    parser.add_argument("--pairs", type=int, default=8, help="of MQAR")
    parser.add_argument("--tokens", type=int, default=64, help="of MQAR")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--only", nargs="*", metavar="LEVEL", help="of MQAR: any level, as a config has it")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)

    def passes() -> None:
        for chunk in args.chunks:
            for name, level in levels(chunk).items():
                if not name.startswith("deltanet") or chunk == args.chunks[0]:
                    cells = ("{:.2f} / {:.2f}".format(*one_pass(level, *size)) for size in sizes)
                    print(f"| {name} | {chunk} | {' | '.join(cells)} |", flush=True)

    def mqar() -> None:
        for name in args.only or ["deltanet", "ttt", "titans", "dla", "self_modifying"]:
            found = [train(nestopt.build("level", yaml.safe_load(name)), task, args.steps, seed) for seed in args.seeds]
            shares = " | ".join(f"{share:.3f}" for share, _ in found)
            print(f"| {name} | {shares} | {sum(s for _, s in found) / len(found):.0f} |", flush=True)

    sizes = [(8, 16), (16, 16), (8, 32), (32, 32)]
    task = Mqar(args.pairs, args.tokens)
    if args.chunks:
        table(["", "chunk", *(f"{n} pairs, D {dim}" for n, dim in sizes)], passes)
    if args.steps:
        table([f"{task.pairs} pairs, {args.steps} steps", *(f"seed {seed}" for seed in args.seeds), "CPU s"], mqar)


if __name__ == "__main__":
    main()
