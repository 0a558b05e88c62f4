"""Running one level over many tensors: those of one shape together where that pays."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from nestopt.core.clock import advance, start
from nestopt.core.level import Level
from nestopt.core.signal import Signal
from nestopt.core.tree import State, leaves, nested, tree_map
from nestopt.optim.views import layout, matrix_view, work_dtype

log = logging.getLogger("nestopt")

SMALL = 1 << 16
"""Tensors of up to so many elements are stacked: above, a kernel's launch no longer shows beside its work."""

STEP, SUM = "step", "group_sum"
"""The optimizer's own state keys: how often it has seen a gradient, and what a group with a period has summed."""


@dataclasses.dataclass
class Item:
    """One parameter in one step: its gradient in the working dtype, its state (flat keys), the level's step count."""

    param: Tensor
    grad: Tensor
    state: dict[str, Any]
    step: int


class Runner:
    """Applies a level to items and stores their new states."""

    def __init__(self) -> None:
        self._one_by_one: set[str] = set()
        self._hollow: dict[Tensor, list[str]] = {}

    def start(self, level: Level, param: Tensor) -> dict[str, Tensor]:
        """The state of a parameter, by dotted keys."""
        tree = start(level, matrix_view(param.detach().to(work_dtype(param)), level))
        if taken := tree.keys() & {STEP, SUM}:
            raise ValueError(
                f"{level.label}: the state key {min(taken)!r} is the optimizer's own; give it another name"
            )
        self._hollow[param] = list(_hollow(tree))
        return {path: leaf.clone() for path, leaf in leaves(tree)}

    def run(self, level: Level, items: list[Item]) -> Iterator[tuple[Item, Tensor]]:
        """Advance every item; yields each with its direction, in the shape of its parameter and the working dtype."""
        groups: dict[tuple[Any, ...], list[Item]] = {}
        for item in items:
            small = item.grad.numel() <= SMALL
            key = (item.grad.shape, item.grad.dtype, item.grad.device, item.step) if small else (id(item),)
            groups.setdefault(key, []).append(item)
        for group in groups.values():
            if len(group) > 1 and not (self._one_by_one and repr(level) in self._one_by_one):
                directions = self._together(level, group)
            else:
                directions = [self._alone(level, item) for item in group]
            for item, direction in zip(group, directions, strict=True):
                yield item, direction.to(item.grad.dtype).reshape(item.param.shape)

    def _alone(self, level: Level, item: Item) -> Tensor:
        grad, param = matrix_view(item.grad, level), matrix_view(item.param.to(item.grad.dtype), level)
        direction, state = advance(level, grad, self._tree(level, item), Signal(item.step, param))
        _check_shape(level, direction, grad)
        return _store_apart(item, state, direction)

    def _together(self, level: Level, items: list[Item]) -> list[Tensor]:
        grads = torch.stack([matrix_view(item.grad, level) for item in items])
        params = torch.stack([matrix_view(item.param.to(item.grad.dtype), level) for item in items])
        states = tree_map(lambda *each: torch.stack(each), *(self._tree(level, item) for item in items))
        step = items[0].step
        if _batched(level):
            directions, new = advance(level, grads, states, Signal(step, params))
        else:
            try:
                directions, new = vmap(lambda g, s, p: advance(level, g, s, Signal(step, p)))(grads, states, params)
            except RuntimeError as error:
                # `step` is pure, so nothing has changed; a mistake in it will be raised again, one by one
                self._one_by_one.add(repr(level))
                log.info("%s can't be batched and runs one tensor at a time: %s", level.label, error)
                return [self._alone(level, item) for item in items]
        _check_shape(level, directions, grads)
        for i, item in enumerate(items):
            _store(item, {path: leaf[i] for path, leaf in leaves(new)})
        return list(directions.unbind())

    def _tree(self, level: Level, item: Item) -> State:
        """The state as the level made it. Its parts without state have no key to be found by, so they are kept here."""
        if item.param not in self._hollow:  # the state was loaded
            self._hollow[item.param] = list(_hollow(layout(level, item.param)))
        tree = nested({key: value for key, value in item.state.items() if key not in (STEP, SUM)})
        for path in self._hollow[item.param]:
            node = tree
            for key in path.split("."):
                node = node.setdefault(key, {})
        return tree


def _batched(level: Level) -> bool:
    """Whether `level` and all levels in it take stacks of tensors."""
    return level.batched and all(_batched(part) for _, part in level.parts() if isinstance(part, Level))


def _hollow(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """The dotted paths of empty dicts in a state."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            if value:
                yield from _hollow(value, f"{prefix}{key}.")
            else:
                yield prefix + key


def _check_shape(level: Level, direction: Tensor, grad: Tensor) -> None:
    if direction.shape != grad.shape:
        raise ValueError(
            f"{level.label}: step returned a direction of shape {tuple(direction.shape)} for a gradient of shape "
            f"{tuple(grad.shape)}; they must be the same"
        )


def _store(item: Item, new: Mapping[str, Tensor]) -> None:
    """Write a new state over the old one. Copied, never kept: a level may return the gradient itself as its state."""
    for key, leaf in new.items():
        old = item.state.get(key)
        if old is leaf:
            continue
        if old is not None and old.shape == leaf.shape:
            old.copy_(leaf)
        else:
            item.state[key] = leaf.clone()


def _store_apart(item: Item, state: State, direction: Tensor) -> Tensor:
    """As `_store`, where what is new may be an old tensor under another key. Returns the direction, safe from that.

    So it is from the step of the parameter, which it may be.
    """
    new, old = dict(leaves(state)), item.state
    written = {_memory(old[key]) for key, leaf in new.items() if key in old and old[key] is not leaf}
    written.add(_memory(item.param))
    for key, leaf in new.items():
        if leaf is not old.get(key) and _memory(leaf) in written:
            new[key] = leaf.clone()
    direction = direction.clone() if _memory(direction) in written else direction
    _store(item, new)
    return direction


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
