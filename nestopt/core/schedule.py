"""Numbers that an optimizer's steps drive: β that rises, weights that fade in."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

Shape = Literal["linear", "cosine", "constant", "half_life"]


class Schedule:
    r"""A number as a function of the step; give one wherever a level takes a number (`momentum(beta=Schedule(…))`).

    The step is how often the optimizer has updated the parameter, from 1, whatever clocks lie between. Before the first
    point the number is the first point's, after the last the last's, and between two it goes from one to the other:

    * `"linear"`; a warmup is `Schedule({0: 0.0, 100: 1.0})`;
    * `"cosine"`: half a wave, flat at both ends;
    * `"constant"`: it stays until the next point (piecewise constant);
    * `"half_life"`: linear in $1/\ln\beta$, which is how long an average with decay β remembers (AdEMAMix).

    Args:
        points: values by steps, one or more; or a function of the step, which is told a whole number (a float64 tensor
            where an optimizer is `capturable`), can't be written in YAML, and whose numbers are checked as they come.
        shape: as above. Default `"linear"`.

    Raises:
        ValueError: no points, a step that is not a whole number of 0 or more, a value that is not finite, another
            shape, or a value outside of (0, 1) for `"half_life"`.

    >>> beta = Schedule({0: 0.9, 100: 0.99})
    >>> round(beta.at(50), 3), beta.at(1000)
    (0.945, 0.99)
    """

    def __init__(
        self, points: Mapping[int, float] | Callable[[Any], float | Tensor], shape: Shape | None = None
    ) -> None:
        self.function = points if callable(points) else None
        if self.function is not None:
            if shape is not None:
                raise ValueError(
                    f"schedule: shape={shape!r} is not allowed with a function, which says all; leave it out"
                )
            self.points: tuple[tuple[int, float], ...] = ()
            self.shape: Shape = "linear"
            return
        if not isinstance(points, Mapping) or not points:
            raise ValueError(
                f"schedule: {points!r} is not allowed; give values by steps, such as {{0: 0.9, 1000: 0.99}}"
            )
        if (shape or "linear") not in get_args(Shape):
            raise ValueError(f"schedule: shape={shape!r} is not allowed; give one of {list(get_args(Shape))}")
        self.shape = shape or "linear"
        self.points = tuple(sorted((_whole(step), _number(value)) for step, value in points.items()))
        if self.shape == "half_life" and not all(0 < value < 1 for _, value in self.points):
            raise ValueError(f"schedule: {points!r} is not allowed; with shape='half_life' give values between 0 and 1")

    def at(self, step: int | Tensor) -> Any:
        """Return the number at a step; of a tensor (whole numbers, on any device) a float64 tensor like it."""
        if self.function is not None:
            return self._checked(self.function(_count(step) if isinstance(step, Tensor) else step))
        if isinstance(step, Tensor):
            return self._at_tensor(step)
        before = [point for point in self.points if point[0] <= step]
        after = [point for point in self.points if point[0] > step]
        if not before or not after or self.shape == "constant":
            return before[-1][1] if before else after[0][1]
        (first, low), (last, high) = before[-1], after[0]
        return float(self._between((step - first) / (last - first), low, high, math.cos))

    def _at_tensor(self, step: Tensor) -> Tensor:
        count = _count(step)
        found = torch.full_like(count, self.points[0][1])
        for (first, low), (last, high) in zip(self.points, (*self.points[1:], self.points[-1]), strict=True):
            share = ((count - first) / max(1, last - first)).clamp(0, 1)
            value = torch.full_like(count, low)
            if last > first and self.shape != "constant":
                value = self._between(share, low, high, torch.cos)
            found = torch.where(count >= first, value, found)
        return found

    def _between(self, share: Any, low: float, high: float, cos: Callable[[Any], Any]) -> Any:
        if self.shape == "half_life":
            a, b = math.log(low), math.log(high)
            power = a * b / ((1 - share) * b + share * a)
            return power.exp() if isinstance(power, Tensor) else math.exp(power)
        if self.shape == "cosine":
            share = (1 - cos(math.pi * share)) / 2
        return low + (high - low) * share

    def _checked(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value
        try:
            return _number(value)
        except ValueError:
            raise ValueError(f"{self!r} gave {value!r}; a schedule's function gives a finite number") from None

    @property
    def ends(self) -> tuple[float, float]:
        """The least and the greatest number; of a function, whose numbers are not known before, that of step 1."""
        values = [self.at(1)] if self.function is not None else [value for _, value in self.points]
        return min(values), max(values)

    def _key(self) -> tuple[Any, ...]:
        return self.function, self.points, self.shape

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Schedule) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        if self.function is not None:
            own = self.function if inspect.isroutine(self.function) else type(self.function)
            return f"Schedule({own.__module__}.{own.__qualname__})"
        return f"Schedule({dict(self.points)}{'' if self.shape == 'linear' else f', {self.shape!r}'})"

    def __str__(self) -> str:
        if self.function is not None:
            return repr(self)
        said = ", ".join(f"{value:g} at step {step}" for step, value in self.points)
        return said if len(self.points) == 1 else f"{said} ({self.shape})"


class Driven(Schedule):
    """A number that something else has just set, and will set again; all that are driven are alike."""

    def __init__(self, value: Any) -> None:
        super().__init__({0: 0.0})
        self.value = value

    def at(self, step: int | Tensor) -> Any:
        return self.value

    def _key(self) -> tuple[Any, ...]:
        return ("driven",)

    def __repr__(self) -> str:
        return repr(self.value)

    __str__ = __repr__


def _count(step: Tensor) -> Tensor:
    """Return a count in which 1 - β keeps its digits, where the device has numbers so wide."""
    return step.to(torch.float32 if step.device.type == "mps" else torch.float64)


def _whole(step: Any) -> int:
    if isinstance(step, str) and step.isdigit():  # JSON has no other keys
        step = int(step)
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ValueError(f"schedule: the step {step!r} is not allowed; give a whole number, 0 or more")
    return step


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"schedule: the value {value!r} is not allowed; give a finite number")
    return float(value)


def is_scheduled(value: Any) -> bool:
    """Return whether a field's value is a schedule, or has one among its numbers."""
    return isinstance(value, Schedule) or (isinstance(value, list | tuple) and any(map(is_scheduled, value)))


def schedules_in(value: Any) -> Iterator[Schedule]:
    """Yield the schedules in a field's value."""
    if isinstance(value, Schedule):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from schedules_in(item)


def resolved(value: Any, number: Callable[[Schedule], Any]) -> Any:
    """Return a field's value with `number(schedule)` in the place of each schedule."""
    if isinstance(value, Schedule):
        return number(value)
    return tuple(resolved(item, number) for item in value) if isinstance(value, list | tuple) else value
