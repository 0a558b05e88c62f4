"""What is stepped at once: tensors as a process has them, or whole tensors that it owns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nestopt.core.gates import bind
from nestopt.core.inputs import INPUTS
from nestopt.core.level import Level
from nestopt.optim.checkpoint import OWN, checked_state
from nestopt.optim.layer_inputs.sums import Totals
from nestopt.optim.optimizer import Nested
from nestopt.optim.sharded.exchange import Exchange, Pending
from nestopt.optim.sharded.saved import (
    CheckpointMismatch,
    Saved,
    StateKeys,
    TensorSlice,
    load_sliced,
    load_weights,
    load_whole,
    sliced_state,
    weights,
    whole_state,
)
from nestopt.optim.sharded.slices import Slice, check_cover, held

Group = dict[str, Any]

LIMIT = 1 << 26
"""Numbers that an owner is sent in a round, about."""


class KnownInputs:
    """What layers were shown, for an optimizer whose parameters stand for the model's."""

    def __init__(self, inputs: dict[Any, Totals | None]) -> None:
        self.inputs = inputs

    def totals(self, param: Tensor) -> Totals | None:
        return self.inputs.get(param)

    def name(self, param: Tensor) -> None:
        """Return None: whoever asks the model's own watcher says what was not seen."""


class Unit(ABC):
    """Parameters of one group that are stepped together.

    Args:
        tensors: what this process has of them, each in one piece of memory.
        table: which slices of which parameters these hold.

    Attributes:
        divided: whether each process has something of its own of them.
        taken: steps.
    """

    divided: ClassVar[bool] = True
    taken: int = 0

    def __init__(self, tensors: Sequence[Tensor], table: Sequence[Slice]) -> None:
        self.tensors, self.table = list(tensors), list(table)

    @abstractmethod
    def step(self, grads: Sequence[Tensor | None], group: Group, inputs: Mapping[str, Totals | None]) -> None:
        """One step, with the gradients of `tensors`, the settings of `group`, and what layers were shown, by name."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the true shapes of all its parameters, of which this process may have nothing."""
        return {piece.name: piece.shape for piece in self.table}

    @abstractmethod
    def inner(self) -> Iterator[Nested]:
        """Return the optimizers at work."""

    def weights(self) -> Iterator[tuple[str, TensorSlice]]:
        """Return the numbers of the parameters that this process has."""
        return weights(self.table, self.tensors)

    def load_weights(self, saved: Saved) -> None:
        load_weights(saved, self.table, self.tensors)

    def train(self, mode: bool) -> None:
        """Have the weights that are trained, or, with `mode=False`, those to evaluate with; as `Nested.train`."""
        for nested in self.inner():
            nested.train(mode)

    @abstractmethod
    def state(self) -> Iterator[tuple[str, TensorSlice]]:
        """Return the state that this process keeps."""

    @abstractmethod
    def load_state(self, saved: Saved, keys: StateKeys) -> None:
        """Put back what of it is this process's. Raises CheckpointMismatch where it is not this optimizer's."""


class Whole(Unit):
    """Parameters that this process has whole: any level."""

    divided: ClassVar[bool] = False

    def __init__(
        self, nested: Nested, group: Group, names: Sequence[str], tensors: Sequence[Tensor], seed: int
    ) -> None:
        super().__init__(
            tensors, [Slice.whole(name, t.shape, i) for i, (name, t) in enumerate(zip(names, tensors, strict=True))]
        )
        self.names = list(names)
        self._nested = _inner(nested, group, names, tensors, seed)

    def step(self, grads: Sequence[Tensor | None], group: Group, inputs: Mapping[str, Totals | None]) -> None:
        _settings(self._nested, group)
        if INPUTS in self._nested.level(group).needs:
            own = zip(self.names, self.tensors, strict=True)
            self._nested.watcher = KnownInputs({tensor: inputs.get(name) for name, tensor in own})
        for tensor, grad in zip(self.tensors, grads, strict=True):
            tensor.grad = grad
        self._nested.step()

    def inner(self) -> Iterator[Nested]:
        yield self._nested

    def state(self) -> Iterator[tuple[str, TensorSlice]]:
        for name, tensor in zip(self.names, self.tensors, strict=True):
            yield from whole_state(name, self._nested.state.get(tensor, {}))

    def load_state(self, saved: Saved, keys: StateKeys) -> None:
        for name, tensor in zip(self.names, self.tensors, strict=True):
            _put(self._nested, tensor, load_whole(saved, keys, name), tensor, name)


class Flat(Unit):
    """Slices of parameters, as they lie: for a level that works entry by entry.

    Raises:
        TypeError: for any other level.
    """

    def __init__(self, nested: Nested, group: Group, tensors: Sequence[Tensor], table: Sequence[Slice]) -> None:
        level = nested.level(group)
        if not level.is_elementwise:
            raise TypeError(f"{level.label} does not work entry by entry, and can't be shown slices of parameters")
        super().__init__(tensors, table)
        self._full = [i for i, tensor in enumerate(tensors) if tensor.numel()]
        names = [f"slice {i}" for i in self._full]
        self._params: dict[int, Tensor] = {
            i: tensors[i] if isinstance(tensors[i], nn.Parameter) else nn.Parameter(tensors[i]) for i in self._full
        }
        settings = {key: value for key, value in group.items() if key != "view"}
        self._nested = _inner(nested, settings, names, list(self._params.values()), 0)

    def step(self, grads: Sequence[Tensor | None], group: Group, inputs: Mapping[str, Totals | None]) -> None:
        _settings(self._nested, {key: value for key, value in group.items() if key != "view"})
        for i, param in self._params.items():
            param.grad = grads[i]
        self._nested.step()
        for param in self._params.values():
            param.grad = None

    def inner(self) -> Iterator[Nested]:
        yield self._nested

    def state(self) -> Iterator[tuple[str, TensorSlice]]:
        states = {i: self._nested.state.get(param, {}) for i, param in self._params.items()}
        return sliced_state(self.table, states)

    def load_state(self, saved: Saved, keys: StateKeys) -> None:
        for i, param in self._params.items():
            found = load_sliced(saved, keys, self.table, i, param)
            name = next(piece.name for piece in held(self.table) if piece.tensor == i) if found else ""
            _put(self._nested, param, found, param, name)


class Owned(Unit):
    """Slices of parameters that a level must see whole: they go to their owners, are stepped there, and come back.

    The owners' tensors are divided into rounds of about `LIMIT` numbers; while one is stepped, the next is on its way
    there and the former on its way back. Weights travel in the dtype of the slices.

    Args:
        tables: the slices of all processes.
        owner: of each parameter, by name.
        comm: the group of processes.
        seed: of states that start at random, the same on all processes; as of `Whole`.
    """

    def __init__(
        self,
        nested: Nested,
        group: Group,
        tensors: Sequence[Tensor],
        tables: Sequence[Sequence[Slice]],
        owner: Mapping[str, int],
        comm: Any,
        seed: int,
    ) -> None:
        rank = torch.distributed.get_rank(comm)
        super().__init__(tensors, tables[rank])
        check_cover(tables)
        self._shapes = {piece.name: piece.shape for table in tables for piece in table}
        self.rounds = [
            _Round(nested, group, names, self._shapes, tables, owner, comm, seed, tensors[0])
            for names in rounds(self._shapes, owner, len(tables), LIMIT)
        ]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def step(self, grads: Sequence[Tensor | None], group: Group, inputs: Mapping[str, Totals | None]) -> None:
        grads = list(grads)
        known = [torch.zeros_like(t) if g is None else g.to(t.dtype) for g, t in zip(grads, self.tensors, strict=True)]
        without = {
            piece.name for piece in self.table if grads[piece.tensor] is None
        }  # no gradient here is none anywhere
        sources = [known, [tensor.detach() for tensor in self.tensors]]
        ahead = self.rounds[0].exchange.gather(sources) if self.rounds else None
        behind: tuple[_Round, Pending] | None = None
        for i, now in enumerate(self.rounds):
            here, ahead = ahead, None
            assert here is not None
            grads_, values = now.exchange.unpack(here, 2)
            if i + 1 < len(self.rounds):
                ahead = self.rounds[i + 1].exchange.gather(sources)
            if behind is not None:
                behind[0].exchange.store(behind[1], sources[1])
            behind = now, now.step(grads_, values, group, inputs, without, sources[1][0])
        if behind is not None:
            behind[0].exchange.store(behind[1], sources[1])

    def train(self, mode: bool) -> None:
        slices = [tensor.detach() for tensor in self.tensors]
        for now in self.rounds:
            (values,) = now.exchange.unpack(now.exchange.gather([slices]), 1)
            now.exchange.store(now.train(values, mode, slices[0]), slices)

    def inner(self) -> Iterator[Nested]:
        for now in self.rounds:
            yield now.nested

    def state(self) -> Iterator[tuple[str, TensorSlice]]:
        for now in self.rounds:
            for name, param in now.work.items():
                yield from whole_state(name, now.nested.state.get(param, {}))

    def load_state(self, saved: Saved, keys: StateKeys) -> None:
        for now in self.rounds:
            for name, param in now.work.items():
                _put(now.nested, param, load_whole(saved, keys, name), _shaped(now.shapes[name], param), name)


class _Round:
    """Some of the parameters of an `Owned`, on this process those that it owns."""

    def __init__(
        self,
        nested: Nested,
        group: Group,
        names: Sequence[str],
        shapes: Mapping[str, tuple[int, ...]],
        tables: Sequence[Sequence[Slice]],
        owner: Mapping[str, int],
        comm: Any,
        seed: int,
        like: Tensor,
    ) -> None:
        self.exchange, self.shapes = Exchange(tables, owner, names, comm), shapes
        mine = [name for name in names if owner[name] == self.exchange.rank]
        self.work = {name: nn.Parameter(_shaped(shapes[name], like.detach())) for name in mine}
        self.nested = _inner(nested, group, mine, list(self.work.values()), seed)
        self._empty()

    def step(
        self,
        grads: dict[str, Tensor],
        values: dict[str, Tensor],
        group: Group,
        inputs: Mapping[str, Totals | None],
        without: set[str],
        like: Tensor,
    ) -> Pending:
        """Step what has come, which is used up, and send it back."""
        _settings(self.nested, group)
        if INPUTS in self.nested.level(group).needs:
            self.nested.watcher = KnownInputs({param: inputs.get(name) for name, param in self.work.items()})
        for name, param in self.work.items():
            param.data, grad = values.pop(name), grads.pop(name)
            param.grad = None if name in without else grad
        self.nested.step()
        pending = self.exchange.scatter({name: param.data for name, param in self.work.items()}, like)
        self._empty()
        return pending

    def train(self, values: dict[str, Tensor], mode: bool, like: Tensor) -> Pending:
        """Put others in the place of the weights that have come, and send them back."""
        for name, param in self.work.items():
            param.data = values.pop(name)
        self.nested.train(mode)
        pending = self.exchange.scatter({name: param.data for name, param in self.work.items()}, like)
        self._empty()
        return pending

    def _empty(self) -> None:
        """Between steps only the state is kept."""
        for param in self.work.values():
            param.grad, param.data = None, param.data.new_empty(0)


def rounds(shapes: Mapping[str, tuple[int, ...]], owner: Mapping[str, int], world: int, limit: int) -> list[list[str]]:
    """Return the parameters in rounds, in each about `limit` numbers of every owner; the same on all processes."""
    found: list[list[str]] = []
    for rank in range(world):
        at, filled = 0, 0
        for name in (name for name in sorted(shapes) if owner[name] == rank):
            numel = torch.Size(shapes[name]).numel()
            if filled and filled + numel > limit:
                at, filled = at + 1, 0
            while len(found) <= at:
                found.append([])
            found[at].append(name)
            filled += numel
    return found


def held_in_rounds(own: Sequence[int], sliced: Sequence[int], work: int = 0) -> int:
    """Return how much `Owned.step` holds at its peak, in numbers, besides slices and states.

    Args:
        own: of the tensors that a process owns, in each round.
        sliced: of its slices, in each round.
        work: that the levels' own steps take.
    """
    most = 2 * (own[0] + sliced[0]) if own else 0
    for i, (mine, slices) in enumerate(zip(own, sliced, strict=True)):
        ahead = 2 * (own[i + 1] + sliced[i + 1]) if i + 1 < len(own) else 0
        behind = own[i - 1] + sliced[i - 1] if i else 0
        # unpacked; the next sent for; stepped; sent back
        most = max(
            most,
            4 * mine + behind,
            2 * mine + behind + ahead,
            2 * mine + ahead + work,
            3 * mine + slices + ahead,
        )
    return most


def _inner(nested: Nested, group: Group, names: Sequence[str], tensors: Sequence[Tensor], seed: int) -> Nested:
    """Return an optimizer of the same kind for these tensors, with the settings of a group."""
    settings = {key: value for key, value in group.items() if key not in OWN}
    return nested.like([{**settings, "params": list(zip(names, tensors, strict=True))}], seed)


def _settings(nested: Nested, group: Group) -> None:
    """Learning rate and all else as the group says now: schedules change it there."""
    for own in nested.param_groups:
        own.update((key, value) for key, value in group.items() if key not in OWN)


def _put(nested: Nested, param: Tensor, found: dict[str, Tensor], like: Tensor, name: str) -> None:
    (group,) = nested.param_groups
    level: Level = bind(nested.level(group))
    if not found:
        nested.state.pop(param, None)
        return
    view = None if level.is_elementwise else group.get("view")
    try:
        state = checked_state(nested, found, like, level, name, view)
    except ValueError as error:
        raise CheckpointMismatch(str(error)) from None
    for key, value in found.items():  # what goes on bit for bit was in the same dtype
        if value.dtype != state[key].dtype:
            raise CheckpointMismatch(f"{name}.{key} is {value.dtype} in the checkpoint, {state[key].dtype} here")
    nested.state[param] = state


def _shaped(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return a tensor of this shape on the device of `like` that takes no memory."""
    return torch.empty((), dtype=like.dtype, device=like.device).expand(shape)
