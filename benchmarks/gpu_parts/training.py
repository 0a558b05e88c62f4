"""Training steps of four models of 340M, as `nestopt train` takes them: time and memory beside what the plan says."""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from benchmarks.gpu_parts import planned, values
from benchmarks.gpu_parts.clock import wall_seconds
from benchmarks.gpu_parts.precision import suffix
from benchmarks.gpu_parts.setting import Row, Setting, attempts, generator
from nestopt.config import Config
from nestopt.nn.hope import Learn
from nestopt.optim import optimizer as make_optimizer
from nestopt.train import engines
from nestopt.train.objective import Objective
from nestopt.train.run import build_model

SHARES = {"transformer-340m": 0.12, "deltanet-340m": 0.16, "titans-340m": 0.30, "hope-340m": 0.42}
"""Of the part's time; what one leaves goes to those after it."""

STEPS = 8
"""Timed, at most."""


def run(setting: Setting) -> Iterator[Row]:
    plans = {} if setting.tiny else values.meta(setting.values).get("plans", {})
    whole = min(setting.left(), 1e6)
    rows, spent = [], 0.0
    for precision in setting.precisions:
        for name in planned.MODELS:
            spent += SHARES[name] / len(setting.precisions)
            until = time.monotonic() + spent * whole
            label = name + suffix(precision)
            rows.append((label, functools.partial(_row, setting, name, precision, plans.get(label), until)))
    yield from attempts(setting, rows, need_s=2.0)


@dataclasses.dataclass(frozen=True)
class Trained:
    """Attributes:
    tokens: of a step.
    first: seconds of the step that loads kernels and makes the states.
    times: seconds of those after it.
    peak: the most bytes held in these; None where nobody counts.
    losses: of the first step and of the last.
    """

    tokens: int
    first: float
    times: Sequence[float]
    peak: float | None
    losses: tuple[float, float]


def _row(setting: Setting, name: str, precision: str | None, plan: Mapping[str, Any] | None, until: float) -> Row:
    found = train(setting, planned.config(name, tiny=setting.tiny, device=setting.device, precision=precision), until)
    step, (begun, ended) = statistics.median(found.times), found.losses
    values: dict[str, Any] = {
        "step, s": step,
        "tokens/s": found.tokens / step,
        "first step, s": found.first,
        "steps": len(found.times),
        "peak GB": None if found.peak is None else found.peak / 1e9,
    }
    if not math.isfinite(ended):
        return Row(
            name + suffix(precision), "failed", f"its loss is {ended} after {len(found.times) + 1} steps", values
        )
    if plan is None and setting.tiny:
        plan = planned.count(name, tiny=True, precision=precision)
    values |= _planned(setting, plan, step)
    return Row(name + suffix(precision), "measured", f"loss {begun:.3f} → {ended:.3f}", values)


def train(setting: Setting, config: Config, until: float) -> Trained:
    """Steps on one batch, as many as there is time for until `until`, and two at the least."""
    engine = engines.make(config)
    lm = build_model(config).to(engine.device)
    learn: Learn = True if config.train.learn == "all" else "mixer"
    engine.attach(Objective(lm, learn), lm, make_optimizer(lm, config))
    shape = (config.data.batch, config.data.window + 1)
    tokens = torch.randint(config.model.vocab, shape, generator=generator(0)).to(engine.device)
    losses: list[torch.Tensor] = []

    def step() -> None:
        loss, _ = engine.update([(tokens,)])
        losses.append(loss.detach())

    first = wall_seconds(setting, step)
    if setting.cuda:
        torch.cuda.reset_peak_memory_stats()
    times = [wall_seconds(setting, step)]
    while not setting.tiny and len(times) < STEPS and time.monotonic() + times[-1] < until:
        times.append(wall_seconds(setting, step))
    peak = torch.cuda.max_memory_allocated() if setting.cuda else None
    ends = float(losses[0]), float(losses[-1])
    return Trained(config.data.batch * config.data.window, first, times, peak, ends)


def _planned(setting: Setting, plan: Mapping[str, Any] | None, step: float) -> dict[str, Any]:
    """What the plan says of memory and time, the latter at the rates measured in this run."""
    if plan is None:
        return {"plan": "not prepared"}
    times = planned.seconds(plan, setting.rates)
    said: dict[str, Any] = {"plan, GB": plan["memory"] / 1e9}
    said |= {f"plan, {what}, s": each for what, each in times.items()}
    if times:
        binds = max(times, key=times.__getitem__)
        said |= {"binds": binds, "× plan": step / times[binds]}
    return said
