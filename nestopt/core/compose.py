"""Levels made of levels: one after another, and side by side. To any depth."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from nestopt.core.associative import AS_IT_IS
from nestopt.core.clock import advance, advance_, start
from nestopt.core.level import Level
from nestopt.core.order import Node
from nestopt.core.part import FieldError, read_part, snake_case
from nestopt.core.signal import Signal
from nestopt.core.tree import State, nested


def _named(levels: Mapping[str, Level] | Iterable[Level], owner: str) -> dict[str, Level]:
    """Children by name. One without a name is called after what it is, so that its state keys say so."""
    named = dict(levels) if isinstance(levels, Mapping) else _name(list(levels))
    if not named:
        raise ValueError(f"{owner}: no levels given; give one or more")
    for name, level in named.items():
        if not isinstance(level, Level):
            raise TypeError(f"{owner}: {name}={level!r} is not a level")
        if not name.replace("-", "_").isidentifier():
            raise ValueError(
                f"{owner}: {name!r} can't name a level; use letters, digits, '_' and '-' (names are state keys)"
            )
    return named


def _name(levels: list[Level]) -> dict[str, Level]:
    """Names that do not depend on the order of siblings: where they are alike, they say in what they differ."""
    bases = [_base(level) for level in levels]
    named: dict[str, Level] = {}
    for level, base in zip(levels, bases, strict=True):
        alike = [other for other, its in zip(levels, bases, strict=True) if its == base]
        name = own = base + "".join(f"_{key}_{_word(getattr(level, key))}" for key in _differing(alike))
        count = 1
        while name in named:  # twins, of which either may be the first
            count += 1
            name = f"{own}_{count}"
        named[name] = level
    return named


def _base(level: Level) -> str:
    base = getattr(level, "label", type(level).__name__)
    return base + (f"_every_{level.period}" if getattr(level, "period", 1) > 1 else "")


def _differing(levels: list[Level]) -> list[str]:
    """Return the fields with plain values in which levels of one kind differ."""
    if len(levels) < 2 or not all(isinstance(level, Level) for level in levels):
        return []
    keys = [field.name for field in dataclasses.fields(levels[0])]
    return [
        key
        for key in keys
        if all(isinstance(getattr(level, key), int | float | str | tuple | None) for level in levels)
        and len({getattr(level, key) for level in levels}) > 1
    ]


def _word(value: object) -> str:
    """Return a value as part of a name: `0.9` as `0_9`."""
    return re.sub(r"\W+", "_", str(value)).strip("_")


class _Levels(dict[str, Level]):
    """Levels by name; equal if they are the same in the same order, which matters here."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mapping) and list(self.items()) == list(other.items())

    __hash__ = None


class _Many(Level):
    batched: ClassVar[bool] = True
    elementwise: ClassVar[bool] = True

    levels: dict[str, Level]

    def __post_init__(self) -> None:
        super().__post_init__()
        self.levels = _Levels(_named(self.levels, snake_case(type(self).__name__)))

    def init(self, param: Tensor) -> State:
        return {name: start(level, param) for name, level in self.levels.items()}

    # -- on tokens: `nestopt.core.token_composition` runs each part by its own form --------------------------------

    @property
    def qk_norm(self) -> bool:
        """Whether a layer should L2-normalise queries and keys: as soon as one part asks for it."""
        return any(getattr(level, "qk_norm", False) for level in self.levels.values())

    @property
    def v_norm(self) -> bool:
        """Whether a layer should L2-normalise values, likewise."""
        return any(getattr(level, "v_norm", False) for level in self.levels.values())

    @property
    def of_tokens(self) -> bool:
        return any(level.of_tokens for level in self.levels.values())

    @property
    def appends(self) -> bool:
        return any(level.appends for level in self.levels.values())

    def learned_start(self, dim_k: int, dim_v: int) -> dict[str, Tensor]:
        return {
            f"{name}.{key}": x
            for name, level in self.levels.items()
            for key, x in level.learned_start(dim_k, dim_v).items()
        }

    def init_tokens(self, dim_k: int, dim_v: int, like: Tensor, learned: State) -> State:
        if not self.of_tokens:
            return super().init_tokens(dim_k, dim_v, like, learned)
        if self.period > 1:
            problem = "is not allowed on tokens, where its parts have clocks of their own; leave it out"
            raise FieldError(self.label, "period", self.period, problem)
        given = nested(learned)
        return {name: level.init_tokens(dim_k, dim_v, like, given.get(name, {})) for name, level in self.levels.items()}


class Chain(_Many):
    """Each level is shown the direction of the one before it; the last one's direction is the chain's.

    State keys are the levels' names. Args: `levels`, by name (or a sequence, named after what they are).
    """

    reads_param: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._several = {
            name: any(isinstance(p, Level) for _, p in level.parts()) for name, level in self.levels.items()
        }

    @property
    def rates_as(self) -> str:
        return list(self.levels.values())[-1].rates_as

    @property
    def forgets_scale(self) -> bool:
        return any(level.forgets_scale for level in self.levels.values())

    def step(self, grad: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        new = {}
        for name, level in self.levels.items():
            grad, new[name] = advance(level, grad, state[name], signal.inside(name))
        return grad, new

    def step_(self, grad: Tensor, state: State, signal: Signal) -> Tensor:
        last, grad, state = self.before_last_(grad, state, signal)
        return advance_(last, grad, state, signal.inside(list(self.levels)[-1]))

    def before_last_(self, grad: Tensor, state: State, signal: Signal) -> tuple[Level, Tensor, State]:
        *before, final = self.levels
        last = self.levels[final]
        for i, (name, level) in enumerate(self.levels.items()):
            # a direction lasts until another level's step, and a level may have several within
            grad = grad.clone() if i and self._several[name] else grad
            if i + 2 == len(self.levels) and level.period == 1 and signal.note is None and last.averages is not None:
                key, keep, take = last.averages
                if level.average_(state[final][key], keep, take, grad, state[name], signal):
                    return AS_IT_IS, state[final][key], {}
            if i < len(before):
                grad = advance_(level, grad, state[name], signal.inside(name))
        return last, grad, state[final]

    def nodes(self, name: str, period: int = 1, after: tuple[str, ...] = ()) -> list[Node]:
        found: list[Node] = []
        for key, level in self.levels.items():
            inner = level.nodes(f"{name}.{key}", period * self.period, after)
            found += inner
            after = tuple(node.name for node in inner)
        return found


class Parallel(_Many):
    """All levels are shown the same gradient; the direction is the weighted sum of theirs.

    Args:
        levels: by name (or a sequence, named after what they are).
        weights: one number per level, in their order. Default: all 1.
    """

    reads_param: ClassVar[bool] = False
    weights: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights is not None:
            self.weights = tuple(self.weights)
            if len(self.weights) != len(self.levels):
                names = ", ".join(self.levels)
                problem = f"has {len(self.weights)} numbers for {len(self.levels)} levels ({names}); give one each"
                raise FieldError(self.label, "weights", self.weights, problem)

    @property
    def forgets_scale(self) -> bool:
        return all(level.forgets_scale for level in self.levels.values())

    def step(self, grad: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        total, new = torch.zeros_like(grad), {}
        for weight, (name, level) in zip(self.weights or [1.0] * len(self.levels), self.levels.items(), strict=True):
            direction, new[name] = advance(level, grad, state[name], signal.inside(name))
            total = total + weight * direction
        return total, new

    def step_(self, grad: Tensor, state: State, signal: Signal) -> Tensor:
        total: Tensor | None = None
        for weight, (name, level) in zip(self.weights or [1.0] * len(self.levels), self.levels.items(), strict=True):
            direction = advance_(level, grad, state[name], signal.inside(name))
            total = direction * weight if total is None else total.add_(direction, alpha=weight)
        assert total is not None  # there is one level at least
        return total

    def nodes(self, name: str, period: int = 1, after: tuple[str, ...] = ()) -> list[Node]:
        return [
            node
            for key, level in self.levels.items()
            for node in level.nodes(f"{name}.{key}", period * self.period, after)
        ]


def _collect(given: Sequence[Any], named: Mapping[str, Any]) -> dict[str, Any]:
    flat: list[Any] = []
    for level in given:
        several = isinstance(level, Iterable) and not isinstance(level, Level | str | Mapping | type)
        flat += list(level) if several else [level]
    levels = [read_part(Level, level, f"levels[{i}]") for i, level in enumerate(flat)]
    return {**_named(levels, "levels"), **named} if levels else dict(named)


def chain(*levels: Any, period: int = 1, **named: Any) -> Chain:
    """Make a `Chain` of levels or specs of them, in order; keyword names become state keys.

    >>> from nestopt.levels import momentum, adam
    >>> list(chain(slow=momentum(0.99), fast=adam()).levels)
    ['slow', 'fast']
    """
    return Chain(_collect(levels, named), period=period)


def parallel(*levels: Any, weights: Sequence[float] | None = None, period: int = 1, **named: Any) -> Parallel:
    """Make a `Parallel` of levels or specs of them, with optional `weights`; keyword names become state keys."""
    return Parallel(_collect(levels, named), weights=None if weights is None else tuple(weights), period=period)
