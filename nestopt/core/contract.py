"""What a level's `init` and `step` must give, said of levels that others wrote, with the plugin they come from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from nestopt.core.clock import advance, start
from nestopt.core.level import Level
from nestopt.core.part import Part
from nestopt.core.registry import BUILTIN, registry
from nestopt.core.signal import Signal
from nestopt.core.tree import State, leaves, tree_map


class ContractError(ValueError):
    """A level gives what no level may."""


def whose(level: Level) -> str:
    """Return the name of a level, and of which plugin it is, if of one."""
    name = registry.name_of(type(level))
    return level.label if name is None else f"{level.label} (plugin {registry.owner('level', name)!r})"


def strangers(part: Part) -> Iterator[Level]:
    """Yield the levels in `part`, itself among them, that are not nestopt's own."""
    if isinstance(part, Level) and type(part).__module__.partition(".")[0] != BUILTIN:
        yield part
    for _, inner in part.parts():
        yield from strangers(inner)


def begun(level: Level, param: Tensor) -> State:
    """Return the start of `level` on `param`. Raises ContractError unless it is a dict of tensors, nested perhaps."""
    state = start(level, param)
    _check_tensors(whose(level), "init", state)
    return state


def stepped(level: Level, grad: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
    """Return what a step of `level` gives.

    Raises:
        ContractError: it changes an argument, or gives anything but a direction that is no wider than the gradient and
            a state with the keys and dtypes of the one before. The direction's shape is left to the caller.
    """
    name, param = whose(level), signal.param
    kept = grad.clone(), tree_map(torch.clone, state), None if param is None else param.clone()
    try:
        given: Any = level.step(grad, state, signal) if level.period == 1 else advance(level, grad, state, signal)
    except (TypeError, AttributeError, KeyError) as error:
        raise ContractError(f"{name}: step fails: {type(error).__name__}: {error}") from error
    if not (isinstance(given, tuple) and len(given) == 2):
        raise ContractError(f"{name}: step returned {_what(given)}; it must return (direction, state)")
    direction, new = given
    if not isinstance(direction, Tensor):
        raise ContractError(f"{name}: the direction is {_what(direction)}; it must be a tensor like the gradient")
    if torch.promote_types(direction.dtype, grad.dtype) != grad.dtype:
        raise ContractError(f"{name}: the direction is {direction.dtype}, not {grad.dtype} as the gradient")
    _check_tensors(name, "step", new)
    before, after = dict(leaves(state)), dict(leaves(new))
    if before.keys() != after.keys():
        raise ContractError(f"{name}: step changes the state's keys from {sorted(before)} to {sorted(after)}")
    for path, leaf in after.items():
        if leaf.dtype != before[path].dtype:
            raise ContractError(f"{name}: the state's {path!r} is {leaf.dtype} after a step, not {before[path].dtype}")
    if not _same(grad, kept[0]):
        raise ContractError(f"{name}: step changes the gradient in place")
    if param is not None and kept[2] is not None and not _same(param, kept[2]):
        raise ContractError(f"{name}: step changes the parameter in place")
    for path, leaf in leaves(kept[1]):
        if not _same(dict(leaves(state))[path], leaf):
            raise ContractError(f"{name}: step changes the state's {path!r} in place")
    return direction, new


def _check_tensors(name: str, function: str, state: object) -> None:
    if not isinstance(state, Mapping):
        raise ContractError(f"{name}: {function} gives {_what(state)} as the state; it must be a dict of tensors")
    for path, leaf in leaves(state):
        if not isinstance(leaf, Tensor):
            raise ContractError(f"{name}: {function}'s {path!r} is {type(leaf).__name__}, not a tensor")


def _what(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(torch.equal(a.nan_to_num(), b.nan_to_num()))
