"""A checkpoint of several parts: each process writes its own, any number of them reads all."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nestopt.config.files import replacing
from nestopt.optim.sharded.saved import TensorSlice
from nestopt.train.checkpoints import file as checkpoint
from nestopt.train.errors import CheckpointError, extra

with extra("train"):
    from safetensors import safe_open

INDEX = "checkpoint.json"
"""What names the parts that belong together: the checkpoint is what this says, and nothing else."""

FORMAT, VERSION = "nestopt-parts", 1


class ShardReader:
    """The checkpoint of a folder, to be read by tensor or stretch of one, whoever wrote it.

    Args:
        folder: with a `checkpoint.json` and the files that it names.

    Attributes:
        meta: the values that were saved.
        number: of the save among those of the folder.

    Raises:
        CheckpointError: there is none, or it can't be read; says which file and why.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self.path = self.folder / INDEX
        self.number, self.files, self.meta = _index(self.path)
        self._where: dict[str, list[tuple[int, int, int]]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        with contextlib.ExitStack() as stack:
            self._open = [stack.enter_context(_opened(self.folder / name)) for name in self.files]
            for i, (name, file) in enumerate(zip(self.files, self._open, strict=True)):
                self._note(i, self.folder / name, file)
            self._close = stack.pop_all()

    @staticmethod
    def number_in(folder: Path) -> int:
        """Return the number of the last save in a folder; 0 if there was none."""
        return _index(folder / INDEX)[0] if (folder / INDEX).exists() else 0

    def _note(self, i: int, path: Path, file: Any) -> None:
        meta = checkpoint.read_header(path, file.metadata() or {})
        stretches = meta["stretches"]
        for key in file.keys():  # noqa: SIM118 (not a dict)
            shape = tuple(file.get_slice(key).get_shape())
            start, whole = 0, shape
            if key in stretches:
                start, whole = stretches[key]["start"], tuple(stretches[key]["shape"])
            if self._shapes.setdefault(key, whole) != whole:
                raise CheckpointError(f"{path}: {key} has another shape than in the other parts")
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

    def save(self, items: Iterable[tuple[str, TensorSlice]], meta: dict[str, Any]) -> None:
        """Write one more. All processes must call it.

        Args:
            items: what this process has, by name; not looked at by those that write no part.
            meta: as for `nestopt.train.checkpoints.file.save`; that of the first process counts.
        """
        self.number += 1
        names = [f"checkpoint-{self.number}-part-{i + 1}-of-{self.parts}.safetensors" for i in range(self.parts)]
        if self.rank < self.parts:
            tensors, stretches = {}, {}
            for key, item in items:
                tensors[key] = item.values
                if item.shape is not None:
                    stretches[key] = {"start": item.start, "shape": list(item.shape)}
            checkpoint.save(self.folder / names[self.rank], tensors, {"stretches": stretches})
        self.wait()
        if self.rank == 0:
            checkpoint.check_json(meta, "meta")
            content = {"format": FORMAT, "version": VERSION, "number": self.number, "files": names, "meta": meta}
            with replacing(self.folder / INDEX) as path:
                path.write_text(json.dumps(content, indent=1), encoding="utf-8")
            for old in self.folder.glob("checkpoint-*.safetensors"):
                if old.name not in names:
                    old.unlink(missing_ok=True)
        self.wait()


def _index(path: Path) -> tuple[int, list[str], dict[str, Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise KeyError("format")
        if content["version"] > VERSION:
            raise CheckpointError(
                f"{path}: was written by a newer nestopt (version {content['version']}; this one reads up to {VERSION})"
            )
        return int(content["number"]), list(content["files"]), dict(content["meta"])
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such checkpoint") from None
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise CheckpointError(f"{path}: is damaged, or no checkpoint of nestopt ({error!r})") from error


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: this part of the checkpoint is missing") from None
    except Exception as error:  # safetensors has an exception of its own for each thing that can be wrong
        raise CheckpointError(f"{path}: cannot be read, it is cut short or damaged ({error})") from error


def load_weights(model: torch.nn.Module, saved: ShardReader, prefix: str) -> None:
    """Put whole weights and buffers into a model, tied ones once.

    Raises:
        CheckpointError: they are of another model.
    """
    wanted = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    persistent = model.state_dict().keys()
    for name, tensor in wanted.items():
        if name in persistent:
            if saved.shape(prefix + name) != tuple(tensor.shape):
                raise CheckpointError(f"{saved.path}: the checkpoint is of another model: {name} differs")
            with torch.no_grad():
                tensor.copy_(saved.whole(prefix + name))
