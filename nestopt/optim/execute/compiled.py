"""Elementwise stacks as one compiled kernel: every number is read once and written once."""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nestopt.core.clock import advance
from nestopt.core.device import number_like
from nestopt.core.gates import scheduled_numbers, schedules_of, with_schedules, with_values
from nestopt.core.level import Level
from nestopt.core.part import Part
from nestopt.core.schedule import Driven
from nestopt.core.signal import Signal
from nestopt.core.tree import State, leaves, tree_map
from nestopt.optim.execute.flat import Flat
from nestopt.optim.execute.update import Slot, UpdateSettings, placed, update
from nestopt.optim.views import work_dtype


class Compiled(Flat):
    """Parameters of an elementwise level; whole tensors or buffers of small ones go through one kernel.

    It is compiled for tensors of any length, at the first step, and once more when numbers of the level have
    changed that no schedule drives: those are told as tensors from then on, as schedules' are.
    """

    whole = True

    def __init__(self, level: Level, slots: Sequence[Slot], *, packed: bool = True) -> None:
        super().__init__(level, slots, packed=packed)
        self.compiled: list[Compilation] = []

    def at_step(self, level: Level, step: int) -> Level:
        return level  # its kernel is told the numbers of schedules

    def move(self, level: Level, grads: Sequence[Tensor], settings: UpdateSettings, step: int) -> None:
        now = next((own for own in self.compiled if own.serves(level, settings)), None)
        if now is None:
            last = self.compiled[-1] if self.compiled else None
            driven = last.driven | set(_changed(last.given, level)) if last else frozenset[str]()
            now = Compilation(level, settings, self.slots[0], driven)
            self.compiled.append(now)
        self.now = now, now.numbers(level, step, settings)
        super().move(level, grads, settings, step)

    def step_piece(
        self, level: Level, param: Tensor, grad: Tensor, state: State, settings: UpdateSettings, step: int
    ) -> None:
        if param.numel() < 2:  # compilers take a length of one for a promise
            super().step_piece(level, param, grad, state, settings, step)
            return
        compiled, numbers = self.now
        compiled.run([param, grad, *(leaf for _, leaf in leaves(state))], numbers)


class Compilation:
    """One step of `level` on flat tensors, in place; what changes from step to step comes as tensors."""

    def __init__(self, level: Level, settings: UpdateSettings, slot: Slot, driven: frozenset[str]) -> None:
        self.given, self.driven, self.settings = level, driven, settings
        level = self.level = self.told(level)
        self.dtype, self.device = work_dtype(slot.param), slot.param.device
        self.tree, self.scheduled = slot.tree, schedules_of(level)
        self.asked = _asked(level, self.scheduled, slot)
        self.compiled = torch.compile(_own_copy(_step), fullgraph=True, options=_OPTIONS)
        self.fresh = True

    def told(self, level: Level) -> Level:
        """Return `level` with what it is told as tensors marked: numbers that have been seen to change."""
        return with_schedules(level, _driven(level, self.driven)) if self.driven else level

    def serves(self, level: Level, settings: UpdateSettings) -> bool:
        """Return whether this is the kernel of `level` for gradients that are treated so."""
        return self.level == self.told(level) and (self.settings.maximize, self.settings.coupled) == (
            settings.maximize,
            settings.coupled,
        )

    def numbers(self, level: Level, step: int, settings: UpdateSettings) -> list[Tensor]:
        """Return the step, learning rate and weight decay, 1 / (1 - β^t) of each average, and schedules' numbers."""
        own = [number for value in scheduled_numbers(self.told(level), step).values() for number in _each(value)]
        betas = [(own[beta] if isinstance(beta, int) else beta, period) for beta, period in self.asked]
        factors = [1 / (1 - beta ** max(1, step // period)) for beta, period in betas]
        # filled in on the device: a copy from the host would wait for it
        like, count = (torch.empty(0, dtype=dtype, device=self.device) for dtype in (self.dtype, torch.int64))
        wide = like if self.device.type == "mps" else like.double()  # 1 - β has to keep its digits
        numbers = [number_like(n, like) for n in (settings.lr, settings.decay, *factors)]
        return [number_like(step, count), *numbers, *(number_like(n, wide) for n in own)]

    def run(self, tensors: list[Tensor], numbers: list[Tensor]) -> None:
        """Step a flat parameter; `tensors` are it, its gradient, and its state's leaves."""
        if self.fresh:
            self.fresh = False
            for tensor in tensors:
                torch._dynamo.mark_dynamic(tensor, 0)  # compiled once for every length
        self.compiled(self, tensors, numbers)


def _step(kernel: Compilation, tensors: list[Tensor], numbers: list[Tensor]) -> None:
    param, grad, *old = tensors
    step, lr, decay, *more = numbers
    factors, own = more[: len(kernel.asked)], more[len(kernel.asked) :]
    paths = [path for path, _ in leaves(kernel.tree)]
    state = placed(kernel.tree, dict(zip(paths, old, strict=True)))
    wide = param.to(kernel.dtype)
    known = dict(zip(kernel.asked, factors, strict=True))
    signal = Signal(step, wide, lr, debiases=lambda beta, period: known[_key(beta, own), period])
    level = with_values(kernel.level, _filled(kernel.scheduled, own)) if own else kernel.level
    direction, new = advance(level, kernel.settings.gradient(grad.to(kernel.dtype), wide), state, signal)
    tree_map(lambda kept, leaf: kept.copy_(leaf), state, new)
    param.copy_(update(wide, direction, lr, decay))


_OPTIONS: dict[str, Any] = {"guard_filter_fn": torch.compiler.skip_all_guards_unsafe}
"""A kernel never meets another level, dtype or layout than its executor's, so none of that has to be checked at every
call, which would take longer than the step of a small tensor."""

_copies = itertools.count()


def _own_copy(function: Callable[..., None]) -> Callable[..., None]:
    """Return `function` with code of its own: the compiler keeps what it has made by the code object."""
    name = f"{function.__name__}_{next(_copies)}"
    return types.FunctionType(function.__code__.replace(co_name=name), function.__globals__, name)


def _changed(old: Part, new: Part, prefix: str = "") -> Iterator[str]:
    """Yield the dotted paths of the fields with numbers in which two levels differ that are otherwise alike."""
    for key in new.field_names:
        a, b = getattr(old, key), getattr(new, key)
        if isinstance(b, float) or (isinstance(b, tuple) and all(isinstance(item, float) for item in b)):
            yield from [prefix + key] if a != b else ()
    for (name, a), (_, b) in zip(old.parts(), new.parts(), strict=True):
        yield from _changed(a, b, f"{prefix}{name}.")


def _driven(part: Part, paths: frozenset[str], prefix: str = "") -> dict[str, Any]:
    """Return what the fields at `paths` hold, their numbers as those that something else sets."""
    found = {
        prefix + key: tuple(map(Driven, value)) if isinstance(value, tuple) else Driven(value)
        for key in part.field_names
        if prefix + key in paths
        for value in [getattr(part, key)]
    }
    for name, inner in part.parts():
        found |= _driven(inner, paths, f"{prefix}{name}.")
    return found


def _each(value: Any) -> list[Any]:
    """Return the numbers of a field's value."""
    return [number for item in value for number in _each(item)] if isinstance(value, tuple) else [value]


def _filled(scheduled: Mapping[str, Any], numbers: Sequence[Tensor]) -> dict[str, Any]:
    """Return what fields with schedules hold, with `numbers`, one for each, in the place of all their numbers."""
    left, found = list(numbers), {}
    for path, value in scheduled.items():
        count = len(_each(value))
        found[path] = tuple(left[:count]) if isinstance(value, tuple) else left[0]
        left = left[count:]
    return found


def _key(beta: float | Tensor, own: Sequence[Tensor]) -> float | int:
    """Return what an average's β is known by: a schedule's by its place among `own`."""
    return next(i for i, number in enumerate(own) if number is beta) if isinstance(beta, Tensor) else beta


def _asked(level: Level, scheduled: Mapping[str, Any], slot: Slot) -> list[tuple[float | int, int]]:
    """Return the (β, period) of every average whose start `level` corrects, found by asking it."""
    asked: dict[tuple[float | int, int], None] = {}

    def note(beta: float | Tensor, period: int) -> Tensor:
        asked[_key(beta, own), period] = None
        return torch.ones((), dtype=one.dtype, device=one.device)

    one = torch.ones(1, dtype=work_dtype(slot.param), device=slot.param.device)
    state = tree_map(lambda leaf: leaf.flatten()[:1].clone(), slot.tree)
    step = torch.ones((), dtype=torch.int64, device=one.device)
    own = [one.new_full((), 0.5) for value in scheduled.values() for _ in _each(value)]
    level = with_values(level, _filled(scheduled, own)) if own else level
    advance(level, one, state, Signal(step, one, 0.0, debiases=note))
    return list(asked)
