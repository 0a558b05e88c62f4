"""What a hot path may do with a device, and the few places where it waits for one or copies to one.

A forward, backward, optimizer or decoding step queues its work on an accelerator and runs ahead of it. Two things end
that: a *wait* (the host asks for a number that the device still has to compute) and a *pageable copy* (the host hands
over memory that it may change, so that it too must wait, and no CUDA graph can be captured). So numbers that the host
knows are filled in on the device (`number_like`), what it must copy goes through pinned memory (`upload`), and a wait
is one of `EXCEPTIONS`, said at the place (`by_contract`).
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from nestopt.core.part import Gate, Number

EXCEPTIONS = {
    "validate": "validate=True looks at every number, to name the first that is not allowed",
    "places": "rows of a batch at places of their own: once for a state from elsewhere (a file, another device, chosen "
    "rows) or after a mask on the device, where clocks must be told on the host when they are due",
    "documents": "starts or cu_seqlens on the device: how documents are packed decides shapes; give them on the CPU",
    "upload": "what the host knows (ends of documents, numbers of rows) is copied from pinned memory, without waiting",
    "agree": "several processes agree at each training step whether to stop and on the time where that ends the run, "
    "and at the first on whether the layers of dgd have seen any rows",
    "attn_mask": "an attn_mask on the device, without is_causal=True, is compared with the causal one",
    "embeddings": "embeddings given to a continuum that learns from next tokens: whose they are is looked up",
    "eigh": "torch.linalg.eigh checks its result on the host: the matrix roots of shampoo and matrix_adagrad",
    "finite": "on_nonfinite='skip' or 'raise' decides on the host whether a step is taken",
    "pretrained": "a model of another library does in its own forward what it does",
}
"""Where a hot path waits for its device, or copies to it, by contract, and why."""

_present: contextvars.ContextVar[str | None] = contextvars.ContextVar("nestopt_exception", default=None)
_refusing: contextvars.ContextVar[bool] = contextvars.ContextVar("nestopt_refusing", default=False)


Function = TypeVar("Function", bound=Callable[..., object])


def constant_in_graphs(function: Function) -> Function:
    """Let compilers take what `function` returns for a constant, as `torch.compiler.assume_constant_result` does.

    That one imports the compiler, a second of work, in every program that decorates a function with it.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


class WaitError(RuntimeError):
    """A wait for the device where there must be none, as in the capture of a CUDA graph."""


@contextlib.contextmanager
def by_contract(reason: str) -> Iterator[None]:
    """Mark what runs within as one of `EXCEPTIONS`.

    Raises:
        KeyError: for another reason.
        WaitError: within `no_exceptions`.
    """
    why = EXCEPTIONS[reason]
    if _refusing.get():
        raise WaitError(why)
    token = _present.set(reason)
    try:
        yield
    finally:
        _present.reset(token)


@contextlib.contextmanager
def no_exceptions() -> Iterator[None]:
    """Refuse every exception within, by a WaitError."""
    token = _refusing.set(True)
    try:
        yield
    finally:
        _refusing.reset(token)


def present_exception() -> str | None:
    """Return the reason of the exception that is marked at present."""
    return _present.get()


def upload(values: Sequence[int] | Tensor, device: torch.device) -> Tensor:
    """Copy what the host knows, whole numbers or a tensor, to a device, without waiting where that can be."""
    made = values if isinstance(values, Tensor) else torch.tensor(values)
    if made.device == device or made.device.type != "cpu":
        return made.to(device)
    with by_contract("upload"):
        return (made.pin_memory() if device.type == "cuda" else made).to(device, non_blocking=True)


_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def remember(tensor: Tensor, numbers: Iterable[int]) -> Tensor:
    """Note that the host knows which `numbers` a tensor of whole numbers holds, as long as nobody changes it in place.

    Returns:
        The tensor, of which this is known; in inference mode a copy, as torch does not count changes of tensors made
        there.
    """
    if torch.compiler.is_compiling():
        return tensor
    if tensor.is_inference():
        with torch.inference_mode(False):
            tensor = tensor.clone()
    _known[tensor] = (tensor._version, sorted(set(numbers)))
    return tensor


def known(tensor: Tensor) -> list[int] | None:
    """Return the different numbers that a tensor holds, rising, if the host knows them (`remember`)."""
    if torch.compiler.is_compiling() or tensor not in _known:
        return None
    version, numbers = _known[tensor]
    return list(numbers) if version == tensor._version else None


def holds_only(tensor: Tensor, number: int) -> bool:
    """Return whether a tensor of whole numbers is known to hold this one only: an accelerator is not asked."""
    if (numbers := known(tensor)) is not None:
        return numbers == [number]
    return tensor.device.type == "cpu" and bool((tensor == number).all())


_blind = contextvars.ContextVar("blind", default=False)


@contextlib.contextmanager
def blindly() -> Iterator[None]:
    """Let `told` know nothing: no shape, and so no call, depends on what tensors hold."""
    token = _blind.set(True)
    try:
        yield
    finally:
        _blind.reset(token)


def told(tensor: Tensor) -> list[int] | None:
    """Return the different numbers that a tensor of whole numbers holds, if the host knows them without waiting."""
    if not torch.compiler.is_compiling() and _blind.get():
        return None
    numbers = known(tensor)
    readable = numbers is None and tensor.device.type == "cpu" and type(tensor) is Tensor
    if not readable or torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return numbers
    return sorted(set(tensor.flatten().tolist()))


def numbers_in(tensor: Tensor) -> list[int]:
    """Return the different numbers that a tensor of whole numbers holds, rising; waits if only a device knows them."""
    if (numbers := known(tensor)) is not None:
        return numbers
    with by_contract("places") if tensor.device.type != "cpu" else contextlib.nullcontext():
        numbers = sorted(set(tensor.flatten().tolist()))
    if not tensor.is_inference():
        remember(tensor, numbers)
    return numbers


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Switch autocast off for this kind of device; meta tensors, of which it raises, have none."""
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


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
