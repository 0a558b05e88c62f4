"""What a hot path may do with a device, and the few places where it waits for one or copies to one.

A forward, backward, optimizer or decoding step queues its work on an accelerator and runs ahead of it. Two things end
that: a *wait* (the host asks for a number that the device still has to compute) and a *pageable copy* (the host hands
over memory that it may change, so that it too must wait, and no CUDA graph can be captured). So numbers that the host
knows are filled in on the device (`number_like`), what it must copy goes through pinned memory (`upload`), and a wait
is one of `WAITS`, said at the place (`waits`).
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from nestopt.core.part import Gate, Number

WAITS = {
    "validate": "validate=True looks at every number, to name the first that is not allowed",
    "places": "rows of a batch at places of their own, once: a state from elsewhere (a file, another device, chosen "
    "rows), or one after a mask on the device, for a level whose clocks must be told on the host when they are due",
    "documents": "starts or cu_seqlens on the device: how documents are packed decides shapes; give them on the CPU",
    "eigh": "torch.linalg.eigh checks its result on the host (matrix roots of shampoo and matrix_adagrad)",
    "returned": "what is returned is Python's: metrics() as numbers, text, a report, a table",
}
"""Where a hot path waits for its device by contract, and why."""

_present: contextvars.ContextVar[str | None] = contextvars.ContextVar("nestopt_wait", default=None)


@contextlib.contextmanager
def waits(reason: str) -> Iterator[None]:
    """Mark what runs within as a wait for the device that is one of `WAITS`.

    Raises:
        KeyError: for another reason.
    """
    WAITS[reason]
    token = _present.set(reason)
    try:
        yield
    finally:
        _present.reset(token)


def present_wait() -> str | None:
    """Return the reason of the wait that is marked by `waits` at present."""
    return _present.get()


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Switch autocast off for this kind of device; meta tensors, which no autocast knows, need no switch."""
    kind = device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else contextlib.nullcontext()


_constants: dict[tuple[tuple[float, ...], torch.dtype, torch.device], Tensor] = {}


def constants(values: Sequence[float], like: Tensor) -> Tensor:
    """Return these numbers `[n]` in the dtype and on the device of `like`; they are copied there once and then kept."""
    key = (tuple(values), like.dtype, like.device)
    if torch.compiler.is_compiling():
        return like.new_tensor(key[0])
    if key not in _constants:
        with torch.inference_mode(False):
            made = torch.tensor(key[0], dtype=like.dtype, device=like.device)
        if type(made) is not Tensor:  # it stands for one while something is counted or traced
            return made
        _constants[key] = made
    return _constants[key]


def where(condition: bool | Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """Choose as `torch.where`, whose condition may also be a bool of Python's: then nothing is computed."""
    return torch.where(condition, yes, no) if isinstance(condition, Tensor) else yes if condition else no


def number_like(value: Number, like: Tensor) -> Tensor:
    """Return `value` in the dtype and on the device of `like`, without a copy from the host if it is a Python number.

    Args:
        value: a number, a tensor of any shape, or a gate, which is at its initial value.
        like: any tensor.

    Returns:
        A tensor of no dimensions, or of the shape that `value` has.
    """
    if isinstance(value, Tensor):
        return value.to(dtype=like.dtype, device=like.device)
    number = value.init if isinstance(value, Gate) else value
    return torch.full((), number, dtype=like.dtype, device=like.device)
