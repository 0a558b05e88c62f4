"""What optimizers cost: CPU time of a step, taken by turns, and bytes of state."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import count

import torch

from benchmarks.memory import held_bytes
from benchmarks.optimizer_quality.problems import PROBLEMS
from benchmarks.optimizer_quality.rows import ROWS, Setting
from benchmarks.optimizer_quality.sweep import Cost
from benchmarks.timing import Call, interleave, ratio


def costs(problem: str, optimizers: Iterable[str], reference: str, rounds: int = 15) -> dict[str, Cost]:
    """Time steps with their forward and backward pass, 10 of each optimizer a round, the reference among them.

    Raises:
        RuntimeError: an optimizer can't step.
    """
    names = list(dict.fromkeys([reference, *optimizers]))
    calls, states = {}, {}
    for name in names:
        calls[name], states[name] = _call(problem, name)
    timings = interleave(calls, rounds, float("inf"), reference)
    found = {}
    for name in names:
        if timings[name].problem:
            raise RuntimeError(f"{name} on {problem}: {timings[name].problem}")
        beside = ratio(timings[name], timings[reference])
        assert beside is not None
        found[name] = Cost(1e3 * timings[name].step_s, beside.median, states[name]())
    return found


def _call(problem: str, name: str) -> tuple[Call, Callable[[], float]]:
    """Return steps to time, at a rate too small to diverge, and what tells the bytes of state a parameter."""
    torch.manual_seed(0)
    task, steps = PROBLEMS[problem](0), count()
    optimizers = ROWS[name].make(Setting(task.model, 1e-3 * ROWS[name].middle))
    params = list(task.model.parameters())

    def run() -> None:
        task.model.zero_grad()
        task.loss(next(steps)).backward()
        for one in optimizers:
            one.step()

    def state() -> float:
        known = [*params, *(param.grad for param in params if param.grad is not None)]
        held = held_bytes([list(one.state.values()) for one in optimizers], known)
        return held / sum(param.numel() for param in params)

    return Call(run, lambda: None, steps=10, warmups=2), state
