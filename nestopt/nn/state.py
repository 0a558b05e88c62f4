"""States that come from outside: whether they fit a layer, said in words before a matrix product says it in numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nestopt.core.part import nearest
from nestopt.core.tree import State

Shapes = dict[str, Any]
"""The shape of a layer's state for one sequence: nested dicts of tuples, the batch's dimension left out. A dimension
of 0 grows with the sequence and may have any size."""


def shapes_of(state: Mapping[str, Any]) -> Shapes:
    """The `Shapes` of a state as it is before the first token."""
    return {
        key: shapes_of(value) if isinstance(value, Mapping) else tuple(value.shape[1:]) for key, value in state.items()
    }


def fitted(state: Mapping[str, Any], shapes: Shapes, batch: int, owner: str, path: str = "state") -> State:
    """`state` with the structure of `shapes`: parts that hold no tensors, which files do not keep, are put back.

    Raises:
        ValueError: where a tensor is missing, unknown, or has another shape; says which.
    """
    if not isinstance(state, Mapping):
        raise ValueError(f"{owner}: {path} is {type(state).__name__}, not a dict; give a state of this layer, or None")
    for key in state:
        if key not in shapes:
            raise ValueError(
                f"{owner}: {path} has {key!r}, which this layer's state has not.{nearest(str(key), shapes)} It has: "
                f"{', '.join(shapes) or 'nothing'}. Is it the state of another layer?"
            )
    found: State = {}
    for key, shape in shapes.items():
        name = f"{path}[{key!r}]"
        if isinstance(shape, dict):
            found[key] = fitted(state.get(key, {}), shape, batch, owner, name)
        elif key not in state:
            raise ValueError(f"{owner}: {name} is missing. Is it the state of another layer?")
        else:
            _check(state[key], shape, batch, owner, name)
            found[key] = state[key]
    return found


def _check(leaf: Any, shape: tuple[int, ...], batch: int, owner: str, name: str) -> None:
    if not isinstance(leaf, Tensor):
        raise ValueError(f"{owner}: {name} is {type(leaf).__name__}, not a tensor")
    given = tuple(leaf.shape)
    if len(given) == len(shape) + 1 and given[0] != batch and _same(given[1:], shape):
        raise ValueError(
            f"{owner}: {name} is of a batch of {given[0]}, and the input of {batch}; every sequence has its own state"
        )
    if given[:1] != (batch,) or not _same(given[1:], shape):
        wanted = ", ".join(str(n) if n else "any" for n in (batch, *shape))
        raise ValueError(f"{owner}: {name} has the shape {list(given)}; for this layer and input it must be [{wanted}]")


def _same(given: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    return len(given) == len(shape) and all(want in (0, have) for have, want in zip(given, shape, strict=True))
