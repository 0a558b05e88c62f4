"""Steps of optimizers on the parameters of a Transformer of 370M beside torch's fused AdamW and its Muon."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

import nestopt
from benchmarks.gpu_parts.clock import interleave, peak
from benchmarks.gpu_parts.setting import Row, Setting, attempts, free

ADAMW, MUON = "torch AdamW, fused", "torch Muon, and AdamW fused"
LR = 1e-4
ROUNDS = 15
M3_PERIOD = 4


class Stepper(Protocol):
    def step(self) -> object: ...


Named = Sequence[tuple[str, nn.Parameter]]


def shapes(tiny: bool) -> dict[str, tuple[int, ...]]:
    """24 blocks of width 1,024 with an embedding and a head of 32,000 tokens: 368 M numbers in 147 tensors."""
    blocks, dim, vocab = (2, 16, 64) if tiny else (24, 1024, 32000)
    found: dict[str, tuple[int, ...]] = {"embedding": (vocab, dim)}
    for i in range(blocks):
        matrices = {"qkv": (3 * dim, dim), "out": (dim, dim), "up": (4 * dim, dim), "down": (dim, 4 * dim)}
        vectors = {"norm1": (dim,), "norm2": (dim,)}
        for name, shape in {**matrices, **vectors}.items():
            found[f"block{i}.{name}"] = shape
    return {**found, "norm": (dim,), "head": (vocab, dim)}


def _is_hidden(name: str) -> bool:
    """Whether Muon takes it."""
    return name.rpartition(".")[2] in ("qkv", "out", "up", "down")


class _Both:
    """torch's Muon on hidden matrices, and its fused AdamW on all else."""

    def __init__(self, named: Named, fused: bool) -> None:
        hidden = [param for name, param in named if _is_hidden(name)]
        others = [param for name, param in named if not _is_hidden(name)]
        self.parts = torch.optim.Muon(hidden, lr=LR), torch.optim.AdamW(others, lr=LR, fused=fused)

    def step(self) -> None:
        for part in self.parts:
            part.step()


def _params(named: Named) -> list[nn.Parameter]:
    return [param for _, param in named]


def _stack(spec: Any, named: Named, **options: Any) -> Stepper:
    """Routed as by `nestopt.optimizer` from a model, which knows what is a hidden matrix."""
    return nestopt.optimizer(named, spec, lr=LR, route=lambda name, param: _is_hidden(name), **options)


ROWS: Mapping[str, Callable[[Named], Stepper]] = {
    ADAMW: lambda named: torch.optim.AdamW(_params(named), lr=LR, fused=True),
    "nestopt AdamW": lambda named: nestopt.optim.AdamW(_params(named), lr=LR),
    "nestopt AdamW, capturable": lambda named: nestopt.optim.AdamW(_params(named), lr=LR, capturable=True),
    MUON: lambda named: _Both(named, fused=True),
    "nestopt muon, rest adamw": functools.partial(_stack, "muon"),
    "nestopt muon, rest adamw, capturable": lambda named: _stack("muon", named, capturable=True),
    f"nestopt m3, rest adamw, mean of {M3_PERIOD}": functools.partial(
        _stack, {"level": "m3", "slow_period": M3_PERIOD}
    ),
    "nestopt momentum, adam, momentum": lambda named: nestopt.optimizer(named, ["momentum", "adam", "momentum"], lr=LR),
}


def run(setting: Setting) -> Iterator[Row]:
    """First steps one after another, which make the states and say what is held; then times, in turn."""
    gradients = {name: 1e-2 * torch.randn(s, device=setting.device) for name, s in shapes(setting.tiny).items()}
    steps: dict[str, Callable[[], None]] = {}
    peaks: dict[str, dict[str, float | None]] = {}

    def first(name: str) -> Row:
        named = [(key, nn.Parameter(torch.zeros_like(grad))) for key, grad in gradients.items()]
        for (key, param), _ in zip(named, gradients, strict=True):
            param.grad = gradients[key]  # of all rows: none of them writes to it
        before = torch.cuda.memory_allocated() if setting.cuda else 0
        optimizer = ROWS[name](named)
        optimizer.step()
        held = torch.cuda.memory_allocated() - before if setting.cuda else None
        step = functools.partial(_steps, optimizer, M3_PERIOD if "mean of" in name else 1)
        step()
        steps[name] = step
        peaks[name] = {"held, GB": held, "step, peak GB": peak(setting, step)}
        if not all(bool(param.isfinite().all()) for _, param in named):
            raise RuntimeError("parameters are not finite")
        return Row(name, "measured")

    rows = [(name, functools.partial(first, name)) for name in ROWS]
    for row in attempts(setting, rows, need_s=3.0):
        if row.outcome != "measured":
            steps.pop(row.name, None)
            yield row
    until = time.monotonic() + 0.8 * min(setting.left(), 1e6)
    times = interleave(setting, steps, 2 if setting.tiny else ROUNDS, until, ADAMW) if steps else {}
    for name, timed in times.items():
        each = M3_PERIOD if "mean of" in name else 1
        taken = {key: None if value is None else value / 1e9 for key, value in peaks[name].items()}
        ratio = None if timed.ratio is None else timed.ratio / each
        values = {"step, ms": 1e3 * timed.seconds / each, f"× {ADAMW}": ratio, **taken, "rounds": timed.rounds}
        if name.startswith(("nestopt muon", "nestopt m3")) and MUON in times:
            values[f"× {MUON}"] = timed.seconds / each / times[MUON].seconds
        yield Row(name, "measured", values=values)
    steps.clear()
    free(setting)


def _steps(optimizer: Stepper, count: int) -> None:
    for _ in range(count):
        optimizer.step()
