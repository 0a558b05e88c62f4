"""A checkpoint of several parts: each process writes its own, any number of them reads all."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nestopt.optim.sharded.saved import TensorSlice
from nestopt.train.checkpoints import file as checkpoint
from nestopt.train.checkpoints.index import Index, Kept, after, read_index
from nestopt.train.errors import CheckpointError, damaged, whole_number
from nestopt.train.folder import INDEX

__all__ = ["INDEX", "ShardReader", "ShardWriter", "check_like", "load_weights", "put_weights"]


class ShardReader:
    """The checkpoint of a folder, to be read by tensor or stretch of one, whoever wrote it.

    Checksums are compared when it is opened; where several processes open it, each compares those of some files.

    Args:
        path: a folder with a `checkpoint.json` and the files that it names, or another file that says what that does.
        rank, world: this process's number and how many open it together.

    Attributes:
        meta: the values that were saved.
        number: of the save among those of the folder.
        kept: the checkpoints of the folder, this one last.

    Raises:
        CheckpointError: there is none, or it can't be read; says which file and why.
    """

    def __init__(self, path: str | os.PathLike[str], rank: int = 0, world: int = 1) -> None:
        self.path = Path(path) if Path(path).suffix == ".json" else Path(path) / INDEX
        self.folder = self.path.parent
        index = read_index(self.path)
        while True:
            try:
                self._read(index, rank, world)
                return
            except CheckpointError:
                before, index = index, read_index(self.path)
                if index.number == before.number:  # else a run has written another in the meantime
                    raise

    def _read(self, index: Index, rank: int, world: int) -> None:
        self.number, self.files, self.meta, self.kept = index.number, index.files, index.meta, index.kept
        self._where: dict[str, list[tuple[int, int, int]]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, str] = {}
        with contextlib.ExitStack() as stack:
            self._open = [stack.enter_context(_opened(self.folder / name)) for name in self.files]
            for i, (name, file) in enumerate(zip(self.files, self._open, strict=True)):
                with damaged(self.folder / name):
                    self._note(i, self.folder / name, file, i % world == rank)
            self._close = stack.pop_all()

    @staticmethod
    def number_in(folder: Path) -> int:
        """Return the number of the last save in a folder; 0 if there was none."""
        return read_index(folder / INDEX).number if (folder / INDEX).exists() else 0

    def _note(self, i: int, path: Path, file: Any, compare: bool) -> None:
        meta, sums = checkpoint.read_header(path, file.metadata() or {})
        if compare:
            checkpoint.compare(path, file, sums)
        stretches = meta["stretches"]
        for key in file.keys():  # noqa: SIM118 (not a dict)
            part = file.get_slice(key)
            shape = tuple(part.get_shape())
            start, whole = 0, shape
            if key in stretches:
                start = whole_number(stretches[key]["start"], "start")
                whole = tuple(whole_number(size, "shape") for size in stretches[key]["shape"])
            if self._shapes.setdefault(key, whole) != whole:
                raise CheckpointError(f"{path}: {key} has another shape than in the other parts")
            if self._dtypes.setdefault(key, part.get_dtype()) != part.get_dtype():
                raise CheckpointError(f"{path}: {key} has another dtype than in the other parts")
            self._where.setdefault(key, []).append((start, math.prod(shape), i))

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *error: object) -> None:
        self._close.close()

    def keys(self) -> Iterable[str]:
        """Return the names of all tensors."""
        return self._where.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of a whole tensor."""
        return self._shapes[self._known(key)]

    def dtype(self, key: str) -> torch.dtype:
        """Return the dtype of a tensor."""
        self._known(key)
        rows = self._open[self._where[key][0][2]].get_slice(key)
        return (rows[:0] if rows.get_shape() else self._tensor(self._where[key][0][2], key)).dtype

    def whole(self, key: str) -> Tensor:
        """Return a whole tensor, on the CPU."""
        shape = self.shape(key)
        start, size, i = self._where[key][0]
        if start == 0 and size == math.prod(shape):
            return self._tensor(i, key).reshape(shape)
        return self.stretch(key, 0, math.prod(shape)).view(shape)

    def stretch(self, key: str, start: int, size: int) -> Tensor:
        """Return `[size]` numbers of a flattened tensor, from `start` on; only the shards that hold them are read.

        Raises:
            CheckpointError: the parts lack some of them.
        """
        self._known(key)
        found, at, out = 0, start, None
        for first, length, i in sorted(self._where[key]):
            low, high = max(at, first), min(start + size, first + length)
            if low >= high or low != at:
                continue
            part = self._numbers(i, key, low - first, high - low)
            if out is None:
                out = part.new_empty(size)
            out[low - start : high - start] = part
            found, at = found + high - low, high
        if found != size or out is None:
            if size == 0:
                return self._tensor(self._where[key][0][2], key).reshape(-1)[:0]
            raise CheckpointError(f"{self.path}: its parts do not have all of {key}")
        return out

    def _numbers(self, i: int, key: str, start: int, size: int) -> Tensor:
        """Return numbers of what file `i` has under this name, of a matrix only the rows that hold them."""
        view = self._open[i].get_slice(key)
        shape = view.get_shape()
        if not shape:
            return self._tensor(i, key).reshape(-1)
        row = math.prod(shape[1:])
        first, last = start // row, -(-(start + size) // row)
        rows: Tensor = view[first:last]
        return rows.reshape(-1)[start - first * row :][:size]

    def _tensor(self, i: int, key: str) -> Tensor:
        tensor: Tensor = self._open[i].get_tensor(key)
        return tensor

    def _known(self, key: str) -> str:
        if key not in self._where:
            raise CheckpointError(f"{self.path}: the checkpoint is of another model: it has no {key}")
        return key


class ShardWriter:
    """Writes the checkpoints of a folder, one after another; at any moment the folder has all of one.

    Each process writes its part to a file of its own. Once all have, the first process replaces `checkpoint.json`,
    which is what makes them the checkpoint, and removes what it named before.

    Args:
        folder: must exist.
        rank: this process's number.
        parts: how many write: those with the least numbers.
        wait: returns when all processes have called it.
        number: of the last save.
    """

    def __init__(
        self, folder: str | os.PathLike[str], rank: int, parts: int, wait: Callable[[], None], number: int = 0
    ) -> None:
        self.folder, self.rank, self.parts, self.wait, self.number = Path(folder), rank, parts, wait, number

    def save(
        self,
        items: Iterable[tuple[str, TensorSlice]],
        meta: dict[str, Any],
        *,
        score: float | None = None,
        keep: int = 1,
    ) -> None:
        """Write one more. All processes must call it.

        Args:
            items: what this process has, by name; not looked at by those that write no part.
            meta: as for `nestopt.train.checkpoints.file.save`; that of the first process counts.
            score: held-out loss of what is saved, if it was measured.
            keep: how many stay, the last ones; the one with the least score stays besides. An older one's index is
                `checkpoint-NUMBER.json`.
        """
        self.number += 1
        new = Kept(self.number, self.parts, score)
        if self.rank < self.parts:
            tensors, stretches = {}, {}
            for key, item in items:
                tensors[key] = item.values
                if item.shape is not None:
                    stretches[key] = {"start": item.start, "shape": list(item.shape)}
            checkpoint.save(self.folder / new.files[self.rank], tensors, {"stretches": stretches})
        self.wait()
        if self.rank == 0:
            self._publish(new, meta, keep)
        self.wait()

    def _publish(self, new: Kept, meta: dict[str, Any], keep: int) -> None:
        path = self.folder / INDEX
        last = read_index(path) if path.exists() else None
        index = after(last, new, meta, keep)
        if last and last.kept[-1] in index.kept:
            last.write(self.folder / last.kept[-1].index)
        index.write(path)
        # only what this run is known to have written: what has such a name besides may be someone's copy
        written = [*index.stale]
        if last:  # a run that was killed had not removed these, or had begun the next save with fewer or more parts
            written += [*last.stale, *Kept(last.number + 1, last.kept[-1].parts).files]
        for name in set(written) - {name for item in index.kept for name in item.files}:
            (self.folder / name).unlink(missing_ok=True)


def _opened(path: Path) -> AbstractContextManager[Any]:
    if not path.exists():
        raise CheckpointError(f"{path}: this part of the checkpoint is missing")
    return checkpoint.opened(path)


def load_weights(model: torch.nn.Module, saved: ShardReader, prefix: str) -> None:
    """Put whole weights and buffers into a model, tied ones once.

    Raises:
        CheckpointError: they are of another model.
    """
    found = {key.removeprefix(prefix): saved.whole(key) for key in saved.keys() if key.startswith(prefix)}  # noqa: SIM118
    put_weights(model, found, saved.path)


def put_weights(model: torch.nn.Module, found: Mapping[str, Tensor], path: Path) -> None:
    """Put weights and buffers into a model, by name; those that are tied under one of their names or all.

    They may have another dtype of the same kind: it is the model's that stays.

    Raises:
        CheckpointError: they are of another model. Nothing has changed then.
    """
    persistent = model.state_dict().keys()
    wanted = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    wanted = {name: tensor for name, tensor in wanted.items() if name in persistent}
    strange = sorted(found.keys() - persistent) or sorted(wanted.keys() - found.keys())
    if strange:
        where = "here" if strange[0] in found else "there"
        raise CheckpointError(f"{path}: its weights are of another model: {strange[0]} is not {where}")
    for name, tensor in wanted.items():
        check_like(path, name, found[name].shape, found[name].dtype, tensor.shape, tensor.dtype)
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(found[name])


def check_like(
    path: Path, name: str, shape: Sequence[int], dtype: torch.dtype, wanted: Sequence[int], kind: torch.dtype
) -> None:
    """Raise CheckpointError if a saved tensor has not the wanted shape, or is of another kind of numbers."""
    if tuple(shape) != tuple(wanted):
        raise CheckpointError(
            f"{path}: the checkpoint is of another model: {name} differs, {list(shape)} and not {list(wanted)}"
        )
    if (dtype.is_floating_point, dtype.is_complex) != (kind.is_floating_point, kind.is_complex):
        raise CheckpointError(f"{path}: is damaged: {name} has the dtype {dtype}, and not {kind}")
