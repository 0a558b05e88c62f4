"""A small network that learns which module some code is from: from all classes at once, and from two at a time."""

from __future__ import annotations

import functools
import itertools
import random
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestopt.config import ConfigError, build
from nestopt.core.level import Level
from nestopt.evidence.trials import Plan
from nestopt.levels.gradient.adam import Adam
from nestopt.optim import Nested
from nestopt.train.errors import CorpusError

MODULES = (
    "argparse",
    "ast",
    "difflib",
    "doctest",
    "inspect",
    "pickletools",
    "statistics",
    "subprocess",
    "tarfile",
    "typing",
)
"""Of the standard library, of which code is: the classes."""

FEATURES, WINDOW, BLOCK = 512, 128, 512
"""Hashed counts of three bytes in a row, of so many bytes of code; blocks of code are of one part each."""

COUNTS = {"train": 2000, "valid": 100, "test": 200}
"""Windows of each class, by part."""

RATES = (0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Of which each optimizer has the one with the least loss on windows for that, with the first seed."""

PASSES = {"one pass": 50, "four passes": 200}
"""Steps of 64 windows that take so many bytes of code as there are in the training part, and four times as many."""

TURN = 2
"""Classes that come at a time."""

LEARNED = 0.85
"""Share of the windows of a turn, not those that are measured, that must be right before the next turn comes."""


class Windows(NamedTuple):
    """Windows `[n, FEATURES]` and their classes `[n]`."""

    x: Tensor
    y: Tensor

    def of(self, classes: Sequence[int]) -> Windows:
        chosen = torch.isin(self.y, torch.tensor(classes))
        return Windows(self.x[chosen], self.y[chosen])


@functools.cache
def windows(part: str) -> Windows:
    """Return the windows of a part, always the same ones of the same Python; one block in five is `valid`, one `test`.

    Raises:
        CorpusError: if the interpreter has no source files.
    """
    found = [_windows(name, part) for name in MODULES]
    y = torch.arange(len(MODULES)).repeat_interleave(COUNTS[part])
    return Windows(torch.cat(found), y)


def starts(name: str, size: int, part: str) -> list[int]:
    """Return where in a module of `size` bytes the windows of a part begin."""
    parts = ("train", "train", "train", "valid", "test")
    blocks = [i for i in range(size // BLOCK) if parts[i % len(parts)] == part]
    chance = random.Random(f"{name}, {part}")
    return [chance.choice(blocks) * BLOCK + chance.randrange(BLOCK - WINDOW) for _ in range(COUNTS[part])]


def _windows(name: str, part: str) -> Tensor:
    path = Path(sysconfig.get_paths()["stdlib"]) / f"{name}.py"
    if not path.is_file():
        raise CorpusError(f"no source text of the standard library: {path} is not there")
    code = torch.tensor(list(path.read_bytes()))
    text = torch.stack([code[start : start + WINDOW] for start in starts(name, len(code), part)])
    hashed = (961 * text[:, :-2] + 31 * text[:, 1:-1] + text[:, 2:]) % FEATURES
    counts = torch.zeros(len(text), FEATURES).scatter_add_(1, hashed, torch.ones(hashed.shape))
    return F.normalize(counts.sqrt(), dim=1) * 8


class Residual(nn.Module):
    """x + W1 σ(W2 norm(x))."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(dim, elementwise_affine=False)
        self.inner, self.outer = (nn.Linear(dim, dim, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(F.silu(self.inner(self.norm(x))))


def network(seed: int) -> nn.Sequential:
    """Return it untrained: all weights are matrices."""
    torch.manual_seed(seed)
    ends = nn.Linear(FEATURES, 64, bias=False), nn.Linear(64, len(MODULES), bias=False)
    return nn.Sequential(ends[0], *(Residual(64) for _ in range(3)), nn.RMSNorm(64, elementwise_affine=False), ends[1])


def _batches(data: Windows, size: int, generator: torch.Generator) -> Iterator[Windows]:
    while True:
        chosen = torch.randint(len(data.y), (size,), generator=generator)
        yield Windows(data.x[chosen], data.y[chosen])


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Windows) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(batch.x), batch.y).backward()
    optimizer.step()


@torch.no_grad()
def _right(model: nn.Module, data: Windows) -> float:
    return (model(data.x).argmax(1) == data.y).double().mean().item()


# -- all at once -------------------------------------------------------------------------------------------------------

OPTIMIZERS: Mapping[str, object] = {
    "momentum": {"level": "momentum", "beta": 0.9},
    "nesterov": {"level": "momentum", "beta": 0.9, "nesterov": True},
}
"""By names that are no level's, or with settings of their own."""


def optimizers(plan: Plan) -> list[dict[str, Any]]:
    """Train the network by each of the plan's levels for as many steps, and return the rows; scores are -loss."""
    tasks = {"one pass": 20} if plan.quick else PASSES
    return [row for name, steps in tasks.items() for row in _optimized(plan, name, steps)]


def _optimized(plan: Plan, name: str, steps: int) -> list[dict[str, Any]]:
    rates = RATES[1::2] if plan.quick else RATES
    levels = {model: build("level", OPTIMIZERS.get(model, model), "--models") for model in plan.models}

    def measured(model: str, rate: float, seed: int) -> dict[str, Any]:
        level = levels[model]
        assert isinstance(level, Level)
        trained, begun = network(seed), time.process_time()
        optimizer = Nested(list(trained.parameters()), level, lr=rate)
        batches = _batches(windows("train"), 64, torch.Generator().manual_seed(seed))
        for batch in itertools.islice(batches, steps):
            for group in optimizer.param_groups:  # down to 0
                group["lr"] = group["lr"] - rate / steps
            _step(trained, optimizer, batch)
        seconds, scores = time.process_time() - begun, {}
        with torch.no_grad():
            for part in ("valid", "test"):
                data = windows(part)
                scores[part] = -F.cross_entropy(trained(data.x), data.y).nan_to_num(1e6, 1e6).item()
        return {"seconds": seconds, "scores": scores}

    return _at_best_rate(plan, f"origin of code, {name}", "equal steps", rates, "valid", measured, lambda _: steps)


def _at_best_rate(
    plan: Plan,
    task: str,
    limit: str,
    rates: Sequence[float],
    part: str,
    measured: Callable[[str, float, int], dict[str, Any]],
    steps: Callable[[Mapping[str, Any]], int],
) -> list[dict[str, Any]]:
    """Return rows of each model with each seed, at the rate whose score on `part` is the greatest with the first."""
    parameters = sum(p.numel() for p in network(0).parameters())

    def row(model: str, rate: float, seed: int) -> dict[str, Any]:
        key = f"{task}, {model}, {limit}, seed {seed}, rate {rate:g}" + (", quick" if plan.quick else "")

        def measure() -> dict[str, Any]:
            plan.say(key)
            found = measured(model, rate, seed)
            same = {"task": task, "model": model, "limit": limit, "seed": seed, "rate": rate, "parameters": parameters}
            return {**same, "steps": steps(found), **found}

        return plan.store.once(key, measure)

    rows = []
    for model in plan.models:
        best = max((row(model, rate, 0) for rate in rates), key=lambda found: found["scores"][part])
        rows += [row(model, best["rate"], seed) for seed in range(plan.seeds)]
    return rows


# -- two at a time -----------------------------------------------------------------------------------------------------

LEARNERS = ("levels", "finetuning", "replay")
"""Adam all of whose weights step at each step, or whose residual blocks do so on three clocks, summing gradients in
between; or that has, in each batch, as many windows of former turns, of which it keeps a few."""

CLOCKS = (64, 8, 1)
"""Of the residual blocks of `levels`, from the first to the last."""

KEPT = 10
"""Windows of each former class, that `replay` keeps."""


def continual(plan: Plan) -> list[dict[str, Any]]:
    """Teach the network two classes after two others, and return the rows.

    Each turn lasts until as much of it is right for all learners. Scores are of test windows: how much is right of the
    turn that is over (`new`, of all turns the mean), and, of all turns but the last, how much more is right after the
    last than right after their own (`kept`, at most about 0).
    """
    for model in plan.models:
        if model not in LEARNERS:
            raise ConfigError.refuse("--models", model, f"give some of {', '.join(LEARNERS)}")
    most = 20 if plan.quick else 1000
    rates = RATES[2:3] if plan.quick else RATES[:6]

    def measured(model: str, rate: float, seed: int) -> dict[str, Any]:
        trained, begun = network(seed), time.process_time()
        optimizer = Nested(groups(trained, model), Adam(), lr=rate)
        generator, taken, reached = torch.Generator().manual_seed(seed), 0, 0
        order = torch.randperm(len(MODULES), generator=generator).tolist()
        turns = [order[i : i + TURN] for i in range(0, len(order), TURN)]
        after: dict[str, list[float]] = {"valid": [], "test": []}
        for turn, classes in enumerate(turns):
            former = few([c for one in turns[:turn] for c in one], generator) if model == "replay" else None
            batches = _batches(windows("train").of(classes), 32, generator)
            again = None if former is None else _batches(former, 32, generator)
            valid = windows("valid").of(classes)
            for step, batch in enumerate(itertools.islice(batches, most), start=1):
                if again is not None:
                    batch = Windows(*map(torch.cat, zip(batch, next(again), strict=True)))
                _step(trained, optimizer, batch)
                taken += 1
                if step % 10 == 0 and _right(trained, valid) >= LEARNED:
                    reached += 1
                    break
            for part, found in after.items():
                found.append(_right(trained, windows(part).of(classes)))
        scores = {"new": sum(after["test"]) / len(turns), "learned": reached / len(turns)}
        for part, name in (("test", "kept"), ("valid", "valid")):
            late = [_right(trained, windows(part).of(classes)) for classes in turns[:-1]]
            scores[name] = sum(end - own for end, own in zip(late, after[part], strict=False)) / len(late)
        if reached < len(turns) and not plan.quick:
            scores["valid"] -= 1  # of a rate at which not all is learned, so that it is the last to be chosen
        return {"taken": taken, "seconds": time.process_time() - begun, "scores": scores}

    limit = f"until {LEARNED:.0%} of the new"
    return _at_best_rate(plan, "code, two modules a turn", limit, rates, "valid", measured, lambda row: row["taken"])


def groups(model: nn.Sequential, learner: str) -> list[dict[str, Any]]:
    """Return the parameters, of `levels` those of each residual block with a clock of their own."""
    blocks = [module for module in model if isinstance(module, Residual)]
    clocks = CLOCKS if learner == "levels" else (1,) * len(blocks)
    inner = [{"params": list(block.parameters()), "period": clock} for block, clock in zip(blocks, clocks, strict=True)]
    ends = [p for module in model if isinstance(module, nn.Linear) for p in module.parameters()]
    return [*inner, {"params": ends}]


def few(classes: Sequence[int], generator: torch.Generator) -> Windows | None:
    """Return the windows that `replay` keeps of these classes; None where there are none."""
    found = []
    for one in classes:
        data = windows("train").of([one])
        chosen = torch.randperm(len(data.y), generator=generator)[:KEPT]
        found.append(Windows(data.x[chosen], data.y[chosen]))
    return Windows(*map(torch.cat, zip(*found, strict=True))) if found else None
