"""States of memories on tokens, nested dicts of tensors `[batch, ...]`: their rows, and whether they fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nestopt.core.device import upload
from nestopt.core.part import nearest
from nestopt.core.pending import COUNT, OF_TOKENS, PENDING, alike, all_settled, without
from nestopt.core.tree import State, leaves, tree_map

PAIRS = {"keys", "values"}
"""The keys of a memory that keeps its pairs, which may keep more of each, `[B, H, n, ..]`; which of them count is its
"mask", where not all do."""


Rows = Sequence[int] | Sequence[bool] | Tensor
"""Sequences of a batch: their numbers, or a bool for each."""


def detach(state: Mapping[str, Any]) -> State:
    """Return `state` without its graph: the outer gradient stops here. The tensors share their memory with `state`."""
    return tree_map(Tensor.detach, state)


def clone(state: Mapping[str, Any]) -> State:
    """A copy that shares no memory with `state` or among its own tensors, each contiguous, as files want them."""
    return tree_map(lambda leaf: leaf.clone(memory_format=torch.contiguous_format), state)


def to(state: Mapping[str, Any], device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> State:
    """Return `state` on another device, its floating tensors in another dtype. Counts and flags keep theirs.

    Raises:
        ValueError: for a `dtype` that is not floating.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"to: dtype={dtype} is not allowed; give a floating dtype")
    return tree_map(lambda leaf: leaf.to(device, dtype if leaf.is_floating_point() else None), state)


def index(state: Mapping[str, Any], rows: Rows) -> State:
    """Return the sequences `rows` of a batch, in that order: to choose some, or to reorder beams (a row may come
    twice).

    Args:
        state: of a batch of n.
        rows: numbers from -n to n - 1, as a list or an integer tensor; or n bools. Not read on a GPU's host.

    Raises:
        ValueError: for a number out of range, where it is on the CPU; for another number of bools, or another dtype.
    """
    first = next((leaf for _, leaf in leaves(state)), None)
    if first is None:
        return tree_map(Tensor.detach, state)  # of a layer without a state
    chosen = numbers(rows, first.shape[0], first.device, "index")
    return all_settled(tree_map(lambda leaf: leaf[chosen], state))


def cat(states: Sequence[Mapping[str, Any]]) -> State:
    """States of one layer, or of equal ones, as one batch.

    Sequences may be at any places of a chunk, and have kept as many pairs (`attention`) as they like: where one has
    fewer than another, places are added that are no tokens, and each goes on as it would alone.

    Args:
        states: one or more, with the same keys, devices and, but for the batch and what grows, shapes.

    Raises:
        ValueError: for none, for states of different layers, dtypes or devices; says which tensor.
    """
    if not states:
        raise ValueError("cat: states is empty; give one or more")
    return _cat(list(states), "state")


def _cat(states: list[Mapping[str, Any]], path: str) -> State:
    first = states[0]
    if PENDING in first and all(PENDING in state for state in states):
        states = alike(states)
    elif set(first) >= PAIRS:
        states = _pairs_filled(states)
    found: State = {}
    for i, state in enumerate(states):
        if set(state) != set(first) and set(state) != set(states[0]):
            differ = ", ".join(sorted(set(state) ^ set(first)))
            raise ValueError(f"cat: states[{i}] and states[0] differ at {path} in {differ}; give states of one layer")
    for key, value in states[0].items():
        name, parts = f"{path}[{key!r}]", [state[key] for state in states]
        if isinstance(value, Mapping):
            found[key] = _cat(parts, name)
        else:
            for i, part in enumerate(parts):
                _check_alike(part, value, name, i)
            found[key] = torch.cat(parts)
    return found


def _check_alike(part: Any, first: Tensor, name: str, i: int) -> None:
    if not isinstance(part, Tensor) or part.shape[1:] != first.shape[1:]:
        shape = list(part.shape) if isinstance(part, Tensor) else type(part).__name__
        raise ValueError(
            f"cat: {name} is {shape} in states[{i}] and {list(first.shape)} in states[0]; but for the batch, which "
            "comes first, they must be the same. Are they of one layer?"
        )
    if (part.dtype, part.device) != (first.dtype, first.device):
        raise ValueError(
            f"cat: {name} is {part.dtype} on {part.device} in states[{i}] and {first.dtype} on {first.device} in "
            "states[0]; they must be the same (see nestopt.nn.to)"
        )


def _pairs_filled(states: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """States of attention with as many pairs; those that are added come first and are masked."""
    counts = [state["keys"].shape[2] for state in states]
    if len(set(counts)) == 1 and not any("mask" in state for state in states):
        return states
    filled: list[Mapping[str, Any]] = []
    for state, count in zip(states, counts, strict=True):
        missing, keys = max(counts) - count, state["keys"]
        mask = state["mask"] if "mask" in state else keys.new_ones((keys.shape[0], count), dtype=torch.bool)
        new: State = {
            name: torch.cat([x.new_zeros(*x.shape[:2], missing, *x.shape[3:]), x], dim=2)
            for name, x in state.items()
            if name != "mask"
        }
        filled.append({**new, "mask": torch.cat([mask.new_zeros(mask.shape[0], missing), mask], dim=1)})
    return filled


def numbers(rows: Rows, batch: int, device: torch.device, owner: str) -> Tensor:
    """Return `rows` of a batch as an integer tensor, or as a bool tensor `[batch]`; checked where nothing waits."""
    given = rows if isinstance(rows, Tensor) else torch.tensor(list(rows), dtype=None if len(rows) else torch.int64)
    if given.ndim != 1 or given.is_floating_point() or given.is_complex():
        raise ValueError(f"{owner}: rows is {given.dtype} {list(given.shape)}; give a list of numbers or bools of rows")
    if given.dtype == torch.bool:
        if given.shape[0] != batch:
            raise ValueError(f"{owner}: rows has {given.shape[0]} bools; the batch has {batch} sequences")
    elif given.device.type == "cpu" and bool(((given < -batch) | (given >= batch)).any()):
        wrong = [row for row in given.tolist() if not -batch <= row < batch]
        raise ValueError(f"{owner}: rows has {wrong[0]}; the batch has {batch} sequences, from 0 to {batch - 1}")
    return upload(given, device)


def reset_rows(state: Mapping[str, Any], begun: Mapping[str, Any], rows: Tensor) -> State:
    """`state` of a batch with `rows` `[B]` (bool) of its tensors those of `begun`; what has grown is not live there."""

    def choose(new: Tensor, old: Tensor) -> Tensor:
        return torch.where(rows.reshape(-1, *(1,) * (old.ndim - 1)), new, old)

    if set(state) >= PAIRS:
        keys = state["keys"]
        mask = state["mask"] if "mask" in state else keys.new_ones((len(rows), keys.shape[2]), dtype=torch.bool)
        zeros = {name: choose(torch.zeros_like(state[name]), state[name]) for name in state if name != "mask"}
        return {**zeros, "mask": mask & ~rows[:, None]}
    found: State = {}
    for key, value in state.items():
        if key == PENDING:
            # gates stay in their range
            zeros = {name: choose(torch.zeros_like(x), x) for name, x in value.items() if name in OF_TOKENS}
            found[key] = without({**value, **zeros}, rows)
        elif isinstance(value, Mapping):
            found[key] = reset_rows(value, begun[key], rows)
        else:
            found[key] = choose(begun[key], value)
    return found


def as_mask(rows: Tensor, batch: int) -> Tensor:
    """Return `rows`, numbers or bools, as a bool for each of `batch` sequences."""
    if rows.dtype == torch.bool:
        return rows
    return torch.zeros(batch, dtype=torch.bool, device=rows.device).index_fill(0, rows % batch, True)


# -- whether a state from outside fits: said in words, before a matrix product says it in numbers ---------------------


class Leaf(NamedTuple):
    """What a tensor of a state must be.

    Attributes:
        shape: without the batch; a dimension of 0 grows with the sequence and may have any size.
        dtype: None for any that is floating.
        optional: may be missing.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    optional: bool = False


Shapes = dict[str, Any]
"""What a layer's state must be: nested dicts of `Leaf`."""


def shapes_of(state: Mapping[str, Any]) -> Shapes:
    """Return the `Shapes` of a state as it is before the first token."""
    found: Shapes = {
        key: shapes_of(value)
        if isinstance(value, Mapping)
        else Leaf(tuple(value.shape[1:]), None if value.is_floating_point() else value.dtype)
        for key, value in state.items()
    }
    if set(found) >= PAIRS:
        found["mask"] = Leaf((0,), torch.bool, optional=True)
    if PENDING in found:
        found[PENDING][COUNT] = Leaf((), torch.int64, optional=True)
    return found


def fitted(
    state: Mapping[str, Any],
    shapes: Shapes,
    batch: int,
    owner: str,
    path: str = "state",
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
) -> State:
    """Return `state` with the structure of `shapes`: parts that hold no tensors, which files do not keep, are put back.

    Args:
        state: from outside.
        shapes: of the layer.
        batch: sequences of the input.
        owner: who speaks in errors.
        path: where `state` is in the whole.
        dtype: of the layer's memory; shorter floating numbers are taken over into it, longer ones refused.
        device: of the input.

    Raises:
        ValueError: where a tensor is missing, unknown, or has another shape or dtype; says which.
    """
    if not isinstance(state, Mapping):
        raise ValueError(f"{owner}: {path} is {type(state).__name__}, not a dict; give a state of this layer, or None")
    for key in state if state.keys() != shapes.keys() else ():
        if key not in shapes:
            required = [name for name, shape in shapes.items() if not (isinstance(shape, Leaf) and shape.optional)]
            raise ValueError(
                f"{owner}: {path} has {key!r}, which this layer's state has not.{nearest(str(key), shapes)} It has: "
                f"{', '.join(required) or 'nothing'}. Is it the state of another layer?"
            )
    found: State = {}
    for key, shape in shapes.items():
        if not isinstance(shape, Leaf):
            found[key] = fitted(state.get(key, {}), shape, batch, owner, f"{path}[{key!r}]", dtype, device)
        elif key in state and _fits(state[key], shape, batch, dtype, device):
            found[key] = state[key]  # nearly always, and a token of a layer has little time for more
        elif key in state:
            found[key] = _fitted_leaf(state[key], shape, batch, owner, f"{path}[{key!r}]", dtype, device)
        elif not shape.optional:
            raise ValueError(f"{owner}: {path}[{key!r}] is missing. Is it the state of another layer?")
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # autograd can save no tensor of inference
        made = {k: x for k, x in found.items() if isinstance(x, Tensor) and x.is_inference()}
        found |= {key: leaf.clone() for key, leaf in made.items()}
    return found


def _fits(leaf: Any, wanted: Leaf, batch: int, dtype: torch.dtype | None, device: torch.device | None) -> bool:
    """Return whether it is what a layer makes itself."""
    if not isinstance(leaf, Tensor) or leaf.dtype != (wanted.dtype or dtype) or (device and leaf.device != device):
        return False
    whole = (batch, *wanted.shape)
    return leaf.shape == whole or (0 in wanted.shape and leaf.shape[:1] == (batch,) and _same(leaf.shape, whole))


def _fitted_leaf(
    leaf: Any, wanted: Leaf, batch: int, owner: str, name: str, dtype: torch.dtype | None, device: torch.device | None
) -> Tensor:
    if not isinstance(leaf, Tensor):
        raise ValueError(f"{owner}: {name} is {type(leaf).__name__}, not a tensor")
    if leaf.shape != (batch, *wanted.shape):
        _check_shape(tuple(leaf.shape), wanted.shape, batch, owner, name)
    if device is not None and leaf.device != device:
        raise ValueError(f"{owner}: {name} is on {leaf.device}, and the input on {device}; see nestopt.nn.to")
    if wanted.dtype is not None:
        if leaf.dtype != wanted.dtype:
            raise ValueError(f"{owner}: {name} is {leaf.dtype}; it must be {wanted.dtype}")
        return leaf
    if leaf.dtype == dtype:
        return leaf
    if not leaf.is_floating_point():
        raise ValueError(f"{owner}: {name} is {leaf.dtype}; it must be floating: {dtype or torch.float32}")
    if dtype is None:
        return leaf
    if torch.promote_types(leaf.dtype, dtype) != dtype:
        raise ValueError(
            f"{owner}: {name} is {leaf.dtype}, and this layer's memory is {dtype}; give "
            f"nestopt.nn.to(state, dtype={dtype}) if that is what is meant"
        )
    return leaf if 0 in wanted.shape else leaf.to(dtype)  # kept pairs are as short as the tokens were


def _check_shape(given: tuple[int, ...], shape: tuple[int, ...], batch: int, owner: str, name: str) -> None:
    if len(given) == len(shape) + 1 and given[0] != batch and _same(given[1:], shape):
        raise ValueError(
            f"{owner}: {name} is of a batch of {given[0]}, and the input of {batch}; every sequence has its own state"
        )
    if given[:1] != (batch,) or not _same(given[1:], shape):
        wanted = ", ".join(str(n) if n else "any" for n in (batch, *shape))
        raise ValueError(f"{owner}: {name} has the shape {list(given)}; for this layer and input it must be [{wanted}]")


def _same(given: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    return len(given) == len(shape) and all(want in (0, have) for have, want in zip(given, shape, strict=True))
