"""State and weights by parameter name, in whole tensors or stretches of them: what a checkpoint is made of."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from nestopt.optim.execute.update import STEP
from nestopt.optim.sharded.slices import Slice, held

WEIGHTS, STATE = "model.", "optimizer."
"""What the names of weights, and of an optimizer's state (`optimizer.NAME|KEY`), begin with."""


class CheckpointMismatch(ValueError):
    """Something saved is of another model or optimizer."""


@dataclasses.dataclass(frozen=True)
class TensorSlice:
    """Some or all numbers of a saved tensor.

    Attributes:
        values: all of it, in its shape, or a stretch `[size]` of its flattened form.
        shape: of the whole tensor; None where `values` is that.
        start: of the stretch.
    """

    values: Tensor
    shape: tuple[int, ...] | None = None
    start: int = 0


class Saved(Protocol):
    """What was saved, to be read in parts."""

    def keys(self) -> Iterable[str]:
        """Return the names of all tensors."""

    def shape(self, key: str) -> tuple[int, ...]:
        """Of a whole tensor."""

    def whole(self, key: str) -> Tensor:
        """Return a whole tensor."""

    def stretch(self, key: str, start: int, size: int) -> Tensor:
        """Some numbers `[size]` of its flattened form."""


class SavedState:
    """What one process has kept, as it lies there.

    Args:
        items: by name.
    """

    def __init__(self, items: Mapping[str, TensorSlice]) -> None:
        self.items = items

    def keys(self) -> Iterable[str]:
        return self.items.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        item = self.items[key]
        return tuple(item.values.shape) if item.shape is None else tuple(item.shape)

    def whole(self, key: str) -> Tensor:
        if self.items[key].shape is not None:
            raise CheckpointMismatch(
                f"of {key} it has a part, and here it is whole; load it at the stage that it was saved at"
            )
        return self.items[key].values

    def stretch(self, key: str, start: int, size: int) -> Tensor:
        item = self.items[key]
        first = start - item.start
        if first < 0 or first + size > item.values.numel():
            raise CheckpointMismatch(f"of {key} it has another part; load it by as many processes, at the same stage")
        return item.values.reshape(-1)[first : first + size]


class StateKeys:
    """Which state a checkpoint has of each parameter."""

    def __init__(self, saved: Saved) -> None:
        self._by_name: dict[str, list[str]] = {}
        for key in saved.keys():  # noqa: SIM118 (not a dict)
            if key.startswith(STATE):
                name, _, part = key.removeprefix(STATE).rpartition("|")
                self._by_name.setdefault(name, []).append(part)

    def of(self, name: str) -> list[str]:
        return self._by_name.get(name, [])

    def names(self) -> set[str]:
        return set(self._by_name)


def weights(table: Iterable[Slice], tensors: Sequence[Tensor]) -> Iterator[tuple[str, TensorSlice]]:
    """Yield the parameters' numbers that a process has."""
    for piece in table:
        if piece.size or not math.prod(piece.shape):
            yield WEIGHTS + piece.name, _stretch(piece, piece.of(tensors).detach())


def load_weights(saved: Saved, table: Iterable[Slice], tensors: Sequence[Tensor]) -> None:
    """Put them back."""
    with torch.no_grad():
        for piece in held(table):
            piece.of(tensors).copy_(saved.stretch(WEIGHTS + piece.name, piece.start, piece.size))


def whole_state(name: str, state: Mapping[str, Tensor]) -> Iterator[tuple[str, TensorSlice]]:
    """Yield the state of one whole parameter."""
    for key, leaf in state.items():
        yield f"{STATE}{name}|{key}", TensorSlice(leaf.detach())


def sliced_state(
    table: Iterable[Slice], states: Mapping[int, Mapping[str, Tensor]]
) -> Iterator[tuple[str, TensorSlice]]:
    """Yield the state of tensors that hold slices: each entry of a parameter has an entry of every state tensor."""
    for piece in held(table):
        for key, leaf in states[piece.tensor].items():
            name = f"{STATE}{piece.name}|{key}"
            if key == STEP:
                yield name, TensorSlice(leaf.detach())
            else:
                yield name, _stretch(piece, leaf.detach().reshape(-1)[piece.offset : piece.offset + piece.size])


def load_whole(saved: Saved, keys: StateKeys, name: str) -> dict[str, Tensor]:
    """Return the state of one whole parameter."""
    return {key: saved.whole(f"{STATE}{name}|{key}") for key in keys.of(name)}


def load_sliced(saved: Saved, keys: StateKeys, table: Sequence[Slice], tensor: int, like: Tensor) -> dict[str, Tensor]:
    """Return the state of the tensor with this number, like which every state tensor is, of the slices that it holds.

    Raises:
        CheckpointMismatch: its parameters are not at the same step, or some have a state and others none.
    """
    pieces = [piece for piece in held(table) if piece.tensor == tensor]
    if not pieces:
        return {}
    wanted = keys.of(pieces[0].name)
    found: dict[str, Tensor] = {}
    for piece in pieces:
        if set(keys.of(piece.name)) != set(wanted):
            raise CheckpointMismatch(
                f"{pieces[0].name} has the state {sorted(wanted)}, {piece.name} {sorted(keys.of(piece.name))}"
            )
        for key in wanted:
            name = f"{STATE}{piece.name}|{key}"
            if key == STEP:
                step = saved.whole(name)
                if not torch.equal(found.setdefault(key, step), step):
                    raise CheckpointMismatch(
                        f"{pieces[0].name} is at step {int(found[key])} and {piece.name} at step {int(step)}; what "
                        "lies in one tensor here is stepped together"
                    )
                continue
            if saved.shape(name) != piece.shape:
                raise CheckpointMismatch(
                    f"{name} has the shape {list(saved.shape(name))}, its parameter {list(piece.shape)}"
                )
            part = saved.stretch(name, piece.start, piece.size)
            if key not in found:
                found[key] = torch.zeros(like.shape, dtype=part.dtype)
            found[key].view(-1)[piece.offset : piece.offset + piece.size] = part
    return found


def _stretch(piece: Slice, part: Tensor) -> TensorSlice:
    return TensorSlice(part.view(piece.shape)) if piece.complete else TensorSlice(part, piece.shape, piece.start)
