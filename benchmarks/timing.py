"""Times of several candidates, taken so that their ratios mean something on a machine that also does other work."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from tqdm import tqdm


@dataclasses.dataclass(frozen=True)
class Call:
    """What is timed.

    Attributes:
        run: one step.
        prepare: run untimed before each step.
        steps: how many steps make one sample, which is their mean.
        warmups: steps before the first sample; the first of them makes the state (or compiles).
    """

    run: Callable[[], object]
    prepare: Callable[[], object]
    steps: int = 1
    warmups: int = 1


@dataclasses.dataclass
class Timing:
    """Seconds of a step.

    Attributes:
        first_s: of the warm-up step; of the last one where there are several, since those before it compile.
        rounds: by round. Empty for a candidate whose first step alone went over its time cap.
        problem: why it was not timed, or stopped.
    """

    first_s: float = float("nan")
    rounds: dict[int, float] = dataclasses.field(default_factory=dict)
    problem: str = ""

    @property
    def step_s(self) -> float:
        """The median over rounds; the first step where there is no round."""
        return statistics.median(self.rounds.values()) if self.rounds else self.first_s


@dataclasses.dataclass(frozen=True)
class Ratio:
    """Median and quartiles, over the rounds that both ran in, of a candidate's time by the other's in that round."""

    median: float
    low: float
    high: float


def clock() -> Callable[[], float]:
    """CPU time of the process with one thread, which is not charged for other processes' turns; else wall time."""
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def ratio(timing: Timing, other: Timing) -> Ratio | None:
    """None if there is nothing to divide; without a common round, of the two `step_s`, with no spread (NaN)."""
    common = [timing.rounds[i] / other.rounds[i] for i in timing.rounds if i in other.rounds]
    if not common:
        value = timing.step_s / other.step_s
        return None if value != value else Ratio(value, float("nan"), float("nan"))
    low, median, high = statistics.quantiles(common, method="inclusive") if len(common) > 1 else common * 3
    return Ratio(median, low, high)


def interleave(
    calls: Mapping[str, Call],
    rounds: int,
    cap_s: float,
    reference: str,
    leave_out_above_s: float = float("inf"),
) -> dict[str, Timing]:
    """Time every candidate once a round, in an order that rotates from round to round.

    Args:
        calls: candidates by name.
        rounds: at most.
        cap_s: a candidate that has used this much timed time joins no further round; one whose first step took longer
            joins none. Not for the reference, which runs as long as another does.
        reference: the candidate that others are compared with.
        leave_out_above_s: a candidate whose first step took longer joins no round and has a `problem`.
    """
    timings = {name: Timing() for name in calls}
    with tqdm(total=len(calls) * (rounds + 1), leave=False, mininterval=0.5) as bar:
        for name, call in calls.items():
            bar.set_description_str(f"first step: {name}")
            _warm_up(call, timings[name])
            if timings[name].first_s > leave_out_above_s and name != reference:
                timings[
                    name
                ].problem = (
                    f"left out: a step takes {timings[name].first_s:.1f} s, over the {leave_out_above_s:g} s of --quick"
                )
            bar.update()
        alive = [
            name
            for name, timing in timings.items()
            if not timing.problem and (timing.first_s <= cap_s or name == reference)
        ]
        spent = dict.fromkeys(alive, 0.0)
        for i in range(rounds):
            start = i % max(1, len(alive))
            for name in alive[start:] + alive[:start]:
                bar.set_description_str(f"round {i + 1}: {name}")
                sample = _sample(calls[name], timings[name])
                if sample is not None:
                    timings[name].rounds[i] = sample
                    spent[name] += sample * calls[name].steps
                bar.update()
            alive = [n for n in alive if not timings[n].problem and (spent[n] < cap_s or n == reference)]
            if alive == [reference] and len(calls) > 1:
                break
    return timings


def _warm_up(call: Call, timing: Timing) -> None:
    for _ in range(call.warmups):
        took = _sample(dataclasses.replace(call, steps=1), timing)
        if took is None:
            return
        timing.first_s = took


def _sample(call: Call, timing: Timing) -> float | None:
    """Seconds of a step; None, and `timing.problem`, if it raised: a peer that can't run is a result, not a crash."""
    now, total = clock(), 0.0
    try:
        for _ in range(call.steps):
            call.prepare()
            start = now()
            call.run()
            total += now() - start
    except Exception as error:
        timing.problem = failure(error)
        return None
    return total / call.steps


def failure(error: Exception) -> str:
    """An exception in one line."""
    lines = str(error).splitlines()
    return f"failed: {type(error).__name__}: {lines[0][:160] if lines else ''}"
