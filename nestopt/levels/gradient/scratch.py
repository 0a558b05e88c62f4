"""A place for intermediate results that is used again: memory that is freed and asked for anew costs page faults."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

LIMIT = 1 << 20
"""Elements: what is larger does not stay in a cache, and is not worth being kept."""


class _Own(threading.local):
    """What each thread has for itself."""

    def __init__(self) -> None:
        self.buffers: dict[torch.dtype, Tensor] = {}
        self.given: dict[torch.dtype, Tensor] = {}


_own = _Own()


def scratch_like(tensor: Tensor) -> Tensor:
    """Return a tensor like `tensor`, its numbers arbitrary; valid until the next call on this thread.

    So a direction kept here is to be read before another level's step (see `Level.step_`).

    One that is still being read, as `tensor`, is not given out again.
    """
    dtype = tensor.dtype
    given = _own.given.get(dtype)
    if given is None or given.shape != tensor.shape:
        count = tensor.numel()
        if count > LIMIT or tensor.device.type != "cpu":
            return torch.empty_like(tensor)
        if dtype not in _own.buffers or _own.buffers[dtype].numel() < count:
            _own.buffers[dtype] = torch.empty(count, dtype=dtype)
        given = _own.given[dtype] = _own.buffers[dtype][:count].view(tensor.shape)
    if given.data_ptr() == tensor.data_ptr() or tensor.device.type != "cpu":
        return torch.empty_like(tensor)
    return given
