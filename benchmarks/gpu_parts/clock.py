"""Times on the device, of several candidates in turn."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping

import torch

from benchmarks.gpu_parts.setting import Setting

Run = Callable[[], object]


def seconds(setting: Setting, run: Run, repeat: int = 1) -> float:
    """Of one of `repeat` calls: by CUDA's events, from the first's start to the last's end; elsewhere by the clock."""
    if not setting.cuda:
        begun = time.perf_counter()
        for _ in range(repeat):
            run()
        return (time.perf_counter() - begun) / repeat
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeat):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeat


def wall_seconds(setting: Setting, run: Run) -> float:
    """Of a call, from the program's side, until the device is done."""
    wait(setting)
    start = time.perf_counter()
    run()
    wait(setting)
    return time.perf_counter() - start


def wait(setting: Setting) -> None:
    if setting.cuda:
        torch.cuda.synchronize()


def best(setting: Setting, run: Run, budget_s: float, repeat: int = 1, least: int = 3) -> float:
    """The least of as many times as fit into a budget, after one that is not counted."""
    seconds(setting, run)
    until, found = time.monotonic() + budget_s, float("inf")
    taken = 0
    while taken < least or time.monotonic() < until:
        found = min(found, seconds(setting, run, repeat))
        taken += 1
    return found


def peak(setting: Setting, run: Run) -> float | None:
    """The most bytes that a call takes of the device beyond what was held before; None where nobody counts."""
    if not setting.cuda:
        run()
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@dataclasses.dataclass(frozen=True)
class Timed:
    """Seconds of a candidate: the median over its rounds, and how many these were; and its ratio to the reference."""

    seconds: float
    rounds: int
    ratio: float | None = None


def interleave(
    setting: Setting, calls: Mapping[str, Run], rounds: int, until: float, reference: str
) -> dict[str, Timed]:
    """Time candidates in turn, each once a round, the order rotating; ratios are medians of those within a round.

    Args:
        setting: where.
        calls: all of them run before, so that no time is of a first call.
        rounds: at most. One that has used twice its share of the time joins no further round, but for the reference.
        until: by `time.monotonic`, after which nothing is begun but what is left of the first round.
        reference: that ratios are to.
    """
    share = 2 * max(0.0, until - time.monotonic()) / len(calls)
    times: dict[str, dict[int, float]] = {name: {} for name in calls}
    for i in range(rounds):
        names = [name for name in calls if i == 0 or name == reference or sum(times[name].values()) < share]
        start = i % len(names)
        for name in names[start:] + names[:start]:
            if i == 0 or time.monotonic() < until:
                times[name][i] = seconds(setting, calls[name])
    found = {}
    for name, own in times.items():
        ratios = [own[i] / times[reference][i] for i in own if i in times.get(reference, {})]
        ratio = statistics.median(ratios) if ratios else None
        found[name] = Timed(statistics.median(own.values()), len(own), ratio)
    return found
