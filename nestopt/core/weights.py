"""Levels on the weights themselves: around a whole stack, they see where its updates have brought the weights."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from nestopt.core.clock import advance, advance_, start
from nestopt.core.level import Level
from nestopt.core.order import Node
from nestopt.core.part import FieldError
from nestopt.core.signal import Signal
from nestopt.core.tree import State, leaves, store


class OfWeights(Level):
    """A level around a stack, its `inner`, that moves or averages the weights after updates.

    Its direction is the stack's. After an update the optimizer calls `after_update`, and takes the weights that it
    returns; `evaluated` gives those to evaluate with. A subclass has a field `inner`; its state holds that of the stack
    under `"inner"`, and tensors like the weights.
    """

    batched: ClassVar[bool] = True
    elementwise: ClassVar[bool] = True
    inner: ClassVar[Any]  # a field of subclasses, at the place where they want it
    outermost: ClassVar[bool] = False
    """Whether no other level of weights may stand around it."""
    across_processes: ClassVar[Any] = False
    """Whether the weights that `after_update` is shown are the mean over all processes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.of_weights and self.period > 1:
            problem = "is not allowed: a level of weights takes no gradients; give the level in it a period"
            raise FieldError(self.label, "period", self.period, problem)

        if self.of_weights and isinstance(self.inner, OfWeights) and self.inner.outermost:
            problem = "is not allowed: it has the weights in several places, so no level of weights can be around it"
            raise FieldError(self.label, "inner", self.inner, problem)

    @property
    def of_weights(self) -> bool:
        return True

    def init(self, param: Tensor) -> State:
        return {"inner": start(self.inner, param)}

    def step(self, grad: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        direction, inner = advance(self.inner, grad, state["inner"], signal)
        return direction, {**state, "inner": inner}

    def step_(self, grad: Tensor, state: State, signal: Signal) -> Tensor:
        return advance_(self.inner, grad, state["inner"], signal)

    def before_last_(self, grad: Tensor, state: State, signal: Signal) -> tuple[Level, Tensor, State]:
        level: Level = self.inner
        return level.before_last_(grad, state["inner"], signal) if level.period == 1 else (level, grad, state["inner"])

    def acts(self, step: int) -> bool:
        """Return whether it does anything after update number `step`, from 1."""
        return True

    @abstractmethod
    def after_update(self, weights: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        """Return the weights to go on from and the new state, given those after update `signal.step`, if it `acts`."""

    def after_update_(self, weights: Tensor, state: State, signal: Signal) -> Tensor:
        """Do as `after_update`, writing over the tensors of `state`; `weights` stay as they are."""
        weights, new = self.after_update(weights, state, signal)
        return store(state, new, weights)

    def explained(self) -> str:
        """Say what it does to the weights, for `explain`."""
        return f"{self.label} acts on the weights"

    def evaluated(self, weights: Tensor, state: State) -> Tensor:
        """Return the weights to evaluate with."""
        return weights

    @property
    def rates_as(self) -> str:
        rates: str = self.inner.rates_as
        return rates

    @property
    def forgets_scale(self) -> bool:
        forgets: bool = self.inner.forgets_scale
        return forgets

    def init_tokens(self, dim_k: int, dim_v: int, like: Tensor, learned: State) -> State:
        problem = "is not allowed on tokens: it moves weights, which are an optimizer's"
        raise FieldError(self.label, "inner", self.inner, problem)

    def nodes(self, name: str, period: int = 1, after: tuple[str, ...] = ()) -> list[Node]:
        remembers = any(leaves(start(self.inner, torch.zeros(2, 2))))
        inner = self.inner.nodes(f"{name}.inner", period, after) if remembers else []
        return [*inner, *self.nodes_of_weights(name, period, tuple(node.name for node in inner))]

    def nodes_of_weights(self, name: str, period: int, after: tuple[str, ...]) -> list[Node]:
        """Return the memories that it keeps beside the stack's, which come `after` those."""
        return []


def around(level: Level) -> Iterator[tuple[tuple[str, ...], OfWeights]]:
    """Yield the levels of weights in `level`, the outermost first, each with the keys of its state."""
    path: tuple[str, ...] = ()
    while isinstance(level, OfWeights) and level.of_weights:
        yield path, level
        level, path = level.inner, (*path, "inner")


def after_update(level: Level, weights: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
    """Return where all levels of weights in `level` go from `weights`, the innermost first, and the new state."""
    if not (isinstance(level, OfWeights) and level.of_weights):
        return weights, state
    weights, inner = after_update(level.inner, weights, state["inner"], signal)
    state = {**state, "inner": inner}
    return level.after_update(weights, state, signal) if level.acts(int(signal.step)) else (weights, state)


def wrapped(level: Level, inner: Level) -> Level:
    """Return `inner` with the levels of weights around it that stand around `level`."""
    if not level.of_weights:
        return inner
    return dataclasses.replace(level, inner=wrapped(level.inner, inner))  # type: ignore[attr-defined, call-arg]


def at(tree: State, path: tuple[str, ...]) -> State:
    """Return the part of a state under `path`."""
    for key in path:
        tree = tree[key]
    return tree
