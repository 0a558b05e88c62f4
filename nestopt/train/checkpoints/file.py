"""Checkpoints: one safetensors file with JSON in its header, written whole or not at all, read without pickle.

Each tensor has a checksum there, over its bytes, dtype and shape, and so has the JSON.
"""

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from nestopt.config.files import replacing
from nestopt.train.errors import CheckpointError, extra
from nestopt.train.folder import check_file

with extra("train"):
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file

FORMAT = "nestopt-checkpoint"
VERSION = 2
"""1 had no checksums."""


def save(path: str | os.PathLike[str], tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write a checkpoint, so that ``path`` at any moment holds all of the old one or all of the new.

    Tensors are copied to the CPU; those that share memory are each written in full, and come back apart.

    Args:
        path: the file, replaced if it is there. Its folder must exist. One process at a time may write to it.
        tensors: by name, of any shape and any dtype that safetensors has.
        meta: numbers, strings, booleans, None, and lists and dicts of them, which come back just as they are.

    Raises:
        TypeError: for a value in ``meta`` that JSON would change (a tuple, a tensor, a key that is not a string), or a
            tensor that is not plain and dense, or is of a dtype that safetensors lacks.
        ValueError: for the name ``"__metadata__"``, which the file format keeps for itself.
    """
    check_json(meta, "meta")
    plain: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        plain[name] = _plain(name, tensor, storages)
    text = json.dumps(meta)
    sums = {"meta": zlib.crc32(text.encode()), "tensors": {name: checksum(tensor) for name, tensor in plain.items()}}
    header = {"format": FORMAT, "version": str(VERSION), "meta": text, "checksums": json.dumps(sums)}
    with replacing(path) as temporary:
        try:
            save_file(plain, temporary, metadata=header)
        except SafetensorError as error:
            raise OSError(f"{path}: can't be written ({error})") from error


def load(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint: the tensors, on ``device``, and the meta that `save` was given.

    Raises:
        CheckpointError: if the file is missing, cut short or damaged, is not one of ours, or is of a newer version.
    """
    with opened(path, device) as file:
        meta, sums = read_header(path, file.metadata() or {})
        compare(path, file, sums)
        return {name: file.get_tensor(name) for name in file.keys()}, meta  # noqa: SIM118 (not a dict)


@contextmanager
def opened(path: str | os.PathLike[str], device: str | torch.device = "cpu") -> Iterator[Any]:
    """Open a safetensors file within this. Raises CheckpointError where it is none, or can't be read."""
    try:
        check_file(path)
        with safe_open(path, framework="pt", device=str(device)) as file:
            yield file
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: there is no such checkpoint") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: cannot be read, it is cut short, damaged or no checkpoint ({error})") from error


def compare(path: str | os.PathLike[str], file: Any, sums: Mapping[str, int] | None) -> None:
    """Raise CheckpointError for a tensor of an open file that is not as it was saved; None has nothing to compare."""
    for name in file.keys() if sums is not None else ():
        if checksum(file.get_tensor(name)) != sums.get(name):  # type: ignore[union-attr]
            raise CheckpointError(f"{path}: is damaged, {name} is not as it was saved")


def checksum(tensor: Tensor) -> int:
    """Return the CRC-32 of a contiguous tensor's dtype, shape and bytes."""
    start = zlib.crc32(f"{tensor.dtype} {list(tensor.shape)}".encode())
    flat = tensor.cpu().reshape(-1)
    flat = flat.as_strided(flat.shape, (1,))  # one number may lie in strides
    return zlib.crc32(flat.view(torch.uint8).numpy().data, start)


def _plain(name: str, tensor: Tensor, storages: set[int]) -> Tensor:
    """Return a tensor as safetensors takes it: on the CPU, contiguous, in memory of its own (noted in ``storages``)."""
    if name == "__metadata__":
        raise ValueError("a tensor cannot be named '__metadata__': the safetensors format keeps that name for itself")
    tensor = tensor.detach()
    if type(tensor) is not Tensor or tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        raise TypeError(f"{name}: only plain dense tensors can be saved, not {_kind(tensor)}")
    if tensor.dtype in (torch.complex32, torch.complex128):
        raise TypeError(f"{name}: safetensors has no {tensor.dtype}")
    tensor = tensor.cpu().contiguous().resolve_conj().resolve_neg()
    if tensor.untyped_storage().data_ptr() in storages:
        tensor = tensor.clone()
    storages.add(tensor.untyped_storage().data_ptr())
    return tensor


def _kind(tensor: Tensor) -> str:
    return f"a {type(tensor).__name__} on {tensor.device} with layout {tensor.layout} and dtype {tensor.dtype}"


def check_json(value: Any, name: str) -> None:
    """Raise TypeError for anything that does not come back from JSON as it went in."""
    if isinstance(value, dict):
        for key, child in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{name}: keys must be strings, not {key!r}")
            check_json(child, f"{name}.{key}")
    elif isinstance(value, list):
        for place, child in enumerate(value):
            check_json(child, f"{name}[{place}]")
    elif value is not None and not isinstance(value, (str, int, float)):
        hint = "; write it as a list" if isinstance(value, tuple) else ""
        raise TypeError(f"{name}: {value!r} is a {type(value).__name__}, which JSON does not have{hint}")


def read_header(
    path: str | os.PathLike[str], header: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, int] | None]:
    """Return the meta in a file's header and its tensors' checksums; None where it is of version 1.

    Raises:
        CheckpointError: it is none of ours, damaged, or of a newer version.
    """
    if header.get("format") != FORMAT:
        raise CheckpointError(f"{path}: is a safetensors file, but no checkpoint of nestopt")
    try:
        version = int(header["version"])
        if version > VERSION:
            raise CheckpointError(
                f"{path}: was written by a newer nestopt (format version {version}; this one reads up to {VERSION})"
            )
        if version < 1:
            raise ValueError(f"version {version}")
        sums = json.loads(header["checksums"]) if version > 1 else None
        if sums is not None and zlib.crc32(header["meta"].encode()) != sums["meta"]:
            raise ValueError("meta is not as it was saved")
        meta = json.loads(header["meta"])
        if not isinstance(meta, dict):
            raise ValueError("meta is no object")
        return meta, None if sums is None else dict(sums["tensors"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its header is damaged ({error!r})") from error
