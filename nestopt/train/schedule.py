"""The learning rate over a run, as a multiplier."""

import math
from abc import abstractmethod
from typing import ClassVar, Literal

from nestopt.core.hookspecs import Register, hookimpl
from nestopt.core.part import Part


class Schedule(Part):
    """How the learning rate goes over a run: `schedule(progress, warmup, decay)` is what multiplies it."""

    kind: ClassVar[str] = "schedule"

    @abstractmethod
    def __call__(self, progress: float, warmup: float, decay: float) -> float:
        """Return the multiplier, 0 or more.

        Args:
            progress: where the run is, above 0 and at most 1.
            warmup, decay: of the configuration: shares of the run.
        """


class Linear(Schedule):
    """Up in a straight line, constant, and down to 0 in a straight line."""

    def __call__(self, progress: float, warmup: float, decay: float) -> float:
        return factor(progress, warmup=warmup, decay=decay)


class Cosine(Schedule):
    """Up in a straight line, constant, and down to 0 along half a wave."""

    def __call__(self, progress: float, warmup: float, decay: float) -> float:
        return factor(progress, warmup=warmup, decay=decay, shape="cosine")


def factor(
    progress: float,
    *,
    warmup: float,
    decay: float,
    floor: float = 0.0,
    shape: Literal["linear", "cosine"] = "linear",
) -> float:
    """Return what multiplies the learning rate: linear from ``floor`` to 1, constant, and back to ``floor``.

    The shape is that of "warmup, stable, decay" schedules; with ``warmup + decay = 1`` nothing is constant between.

    Args:
        progress: where the run is, from 0 (start) to 1 (end). Step t of n (from 0) is at (t + 1) / n, if its rate is
            to be neither zero at the first step nor above ``floor`` at the last.
        warmup: share of the run that warms up, in [0, 1]; 0 starts at 1.
        decay: share of the run, at its end, that decays, in [0, 1]; 0 ends at 1.
        floor: the least multiplier, in [0, 1].
        shape: of the decay: ``"linear"``, or ``"cosine"`` (half a wave).

    Returns:
        The multiplier, in [floor, 1], continuous in ``progress``.

    Raises:
        ValueError: for a number outside its range, ``warmup + decay > 1``, or an unknown shape.

    Example:
        >>> [round(factor(p, warmup=0.1, decay=0.5), 2) for p in (0.05, 0.1, 0.5, 0.75, 1)]
        [0.5, 1.0, 1.0, 0.5, 0.0]
    """
    for name, value in {"progress": progress, "warmup": warmup, "decay": decay, "floor": floor}.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be in [0, 1], not {value}")
    if warmup + decay > 1 + 1e-9:
        raise ValueError(f"warmup + decay must be at most 1, not {warmup} + {decay} = {warmup + decay:g}")
    if shape not in ("linear", "cosine"):
        raise ValueError(f"shape must be 'linear' or 'cosine', not {shape!r}")
    if progress < warmup:
        height = progress / warmup
    elif 1 - progress < decay:
        left = (1 - progress) / decay
        height = left if shape == "linear" else (1 - math.cos(math.pi * left)) / 2
    else:
        height = 1.0
    return floor + (1 - floor) * height


@hookimpl
def nestopt_register_schedules(register: Register) -> None:
    """Register the schedules of this file."""
    register("linear", Linear)
    register("cosine", Cosine)
