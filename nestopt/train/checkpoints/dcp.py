"""Folders of `torch.distributed.checkpoint` (DCP): tensors by name, written by torch and read without running a pickle.

DCP keeps what is in its files in a pickle, `.metadata`. Here its classes are read as plain records, and nothing else is
called. Tensors are read by torch's own reader of weights; values that are no tensors are pickles too, and left alone.
"""

from __future__ import annotations

import io
import math
import pickle
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nestopt.train.errors import CheckpointError, damaged
from nestopt.train.folder import read_file

METADATA = ".metadata"


def write(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors into an empty folder, from this process alone."""
    from torch.distributed.checkpoint.state_dict_saver import save

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        save(dict(tensors), checkpoint_id=folder, no_dist=True)


def read(folder: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Return the whole tensors of a folder by name, on the CPU, and the names of what is no tensor.

    Raises:
        CheckpointError: there is none, it is damaged, or it asks for what is no record of DCP's.
    """
    path = folder / METADATA
    try:
        data = read_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{folder}: is no folder of torch.distributed.checkpoint: it has no {METADATA}") from None
    with damaged(path):
        try:
            metadata = _Records(io.BytesIO(data)).load()
        except (pickle.UnpicklingError, EOFError, ImportError, MemoryError) as error:
            raise CheckpointError(f"{path}: can't be read safely: {error}") from None
        pieces: dict[str, list[tuple[tuple[int, ...], Any]]] = {}
        for index, place in metadata.storage_data.items():
            pieces.setdefault(index.fqn, []).append((tuple(getattr(index, "offset", ())), place))
        tensors, others = {}, []
        for name, entry in metadata.state_dict_metadata.items():
            if hasattr(entry, "chunks"):
                tensors[name] = _whole(folder, name, entry, dict(pieces.get(name, [])))
            else:
                others.append(name)
        return tensors, others


def _whole(folder: Path, name: str, entry: Any, pieces: Mapping[tuple[int, ...], Any]) -> Tensor:
    """Put a tensor together of its pieces, by the offsets at which they begin."""
    dtype, shape = entry.properties.state[0], tuple(entry.size)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"the dtype of {name} is {dtype!r}")
    chunks = {tuple(chunk.offsets): tuple(chunk.sizes) for chunk in entry.chunks}
    for at, sizes in chunks.items():
        if any(not 0 <= first <= first + size <= most for first, size, most in zip(at, sizes, shape, strict=True)):
            raise ValueError(f"a piece of {name} at {at} is outside of it")
    if chunks.keys() - pieces.keys() or sum(map(math.prod, chunks.values())) != math.prod(shape):
        raise CheckpointError(f"{folder}: has not all of {name}")
    found = []
    for at, sizes in chunks.items():
        part = _piece(folder, pieces[at])
        if (tuple(part.shape), part.dtype) != (sizes, dtype):
            raise CheckpointError(f"{folder}: is damaged, a piece of {name} is not of the shape and dtype it should be")
        found.append((tuple(slice(first, first + size) for first, size in zip(at, sizes, strict=True)), part))
    if len(found) == 1:
        return found[0][1]
    out = torch.empty(shape, dtype=dtype)
    for place, part in found:
        out[place] = part
    return out


def _piece(folder: Path, place: Any) -> Tensor:
    """Read a stretch of one of the folder's files as a tensor."""
    name, start, length = place.relative_path, place.offset, place.length
    if not isinstance(name, str) or Path(name).name != name or name == METADATA:
        raise ValueError(f"{name!r} is no name of a file of the folder")
    if getattr(place, "transform_descriptors", None):
        raise CheckpointError(f"{folder / name}: is compressed or encrypted, which can't be read here")
    try:
        with open(folder / name, "rb") as file:
            file.seek(start)
            data = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{folder / name}: can't be read: {error.strerror}") from None
    try:
        found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{folder / name}: holds what is no tensor ({str(error).splitlines()[0]})") from None
    if type(found) is not Tensor:
        raise CheckpointError(f"{folder / name}: holds a {type(found).__name__}, and not a tensor")
    return found


class _Record:
    """What an object of DCP's holds, and none of what it does."""

    def __init__(self, *given: Any) -> None:
        self.given = given

    def __setstate__(self, state: Any) -> None:
        self.state = state
        if isinstance(state, dict):
            self.__dict__.update(state)


_KNOWN = {
    "pathlib": {"PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
}
"""Classes and functions of a DCP pickle, each of which becomes a record."""


class _Records(pickle.Unpickler):
    """Reads a pickle of which every object is a record, a size, a dtype, or plain data."""

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        if name in _KNOWN.get(module, ()):
            return type(name, (_Record,), {})
        if (module, name) == ("torch", "Size"):
            return tuple
        if module == "torch" and isinstance(found := getattr(torch, name, None), torch.dtype):
            return found  # type: ignore[return-value]  # a value, where pickle looks for classes
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no part of such a folder")
