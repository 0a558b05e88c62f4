"""Memory that an optimizer holds between steps, and what a step takes beyond it."""

from __future__ import annotations

import gc
import os
import resource
import subprocess
import sys
import types
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]


def held_bytes(owner: object, without: Iterable[Tensor]) -> int:
    """Bytes of the tensors that `owner` holds, each storage once, without those of `without` (parameters, gradients).

    Follows containers and attributes, so buffers kept outside of `optimizer.state` count too.
    """
    skip = {tensor.untyped_storage().data_ptr() for tensor in without}
    storages = (tensor.untyped_storage() for tensor in _tensors(owner, set()))
    found = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return sum(size for pointer, size in found.items() if pointer and pointer not in skip)


def _tensors(thing: Any, seen: set[int]) -> Iterator[Tensor]:
    if id(thing) in seen or isinstance(thing, str | bytes | int | float | type | types.ModuleType):
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        yield thing
        return
    if isinstance(thing, Mapping):
        inside = [*thing.keys(), *thing.values()]
    elif isinstance(thing, list | tuple | set | frozenset):
        inside = list(thing)
    else:
        slots = (name for cls in type(thing).__mro__ for name in getattr(cls, "__slots__", ()))
        inside = [*getattr(thing, "__dict__", {}).values(), *(getattr(thing, name, None) for name in slots)]
    for part in inside:
        yield from _tensors(part, seen)


# -- transient memory, from the operating system ---------------------------------------------------------------------


def in_fresh_process(module: str, arguments: list[str], timeout_s: float) -> str:
    """The last line that `python -m module arguments` prints, with an allocator that returns freed blocks at once.

    Raises:
        RuntimeError: it failed or took too long.
    """
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    # the resident size then follows the tensors that are alive
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    command = [sys.executable, "-m", module, *arguments]
    try:
        done = subprocess.run(command, env=environment, text=True, capture_output=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"no answer in {timeout_s:.0f} s") from None
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    return lines[-1]


def resident_bytes() -> int:
    """Physical memory of this process. Linux only."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def forget_peak() -> None:
    """Let `peak_bytes` begin anew."""
    gc.collect()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def peak_bytes() -> int:
    """The most physical memory since `forget_peak`."""
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
