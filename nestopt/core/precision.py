r"""The precision of the products of memories: one setting for all of them, `"float32"`, `"tf32"` or `"bfloat16"`.

It is that of matrix products alone. What is summed up (states, gradients, momenta, gates and their products, norms,
triangular solves) is float32 whatever it is, and so is what a product gives:

* `"float32"`: the dtype of the numbers themselves, and so float64 where they are that.
* `"tf32"`: factors are rounded to 10 bits of mantissa, by a GPU with a compute capability of 8 or more.
* `"bfloat16"`: factors are rounded to 7 bits of mantissa. On a GPU sums are given back in float32; on a CPU, for which
  torch has no such product, they come back rounded to bfloat16, and are widened.

An operation that runs memories says which it is to be by `products_in`, and multiplies by `matmul`. Backward passes run
later, and on a GPU on another thread: every product keeps the precision that it was made at for its gradients, and
theirs. An autograd function that multiplies is given `product()`, and multiplies by that in both passes.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from nestopt.core.device import constant_in_graphs
from nestopt.core.part import nearest

Precision = Literal["float32", "tf32", "bfloat16"]

PRECISIONS: tuple[str, ...] = get_args(Precision)

LEAST_CAPABILITY = 8
"""Of a CUDA device that has TF32 and bfloat16, the first number (Ampere)."""


def check_precision(value: object, owner: str = "") -> None:
    """Raise ValueError unless `value` is a `Precision`; `owner` begins the message."""
    if value not in PRECISIONS:
        hint = nearest(value, PRECISIONS) if isinstance(value, str) else ""
        allowed = ", ".join(map(repr, PRECISIONS))
        start = f"{owner}: " if owner else ""
        raise ValueError(f"{start}precision={value!r} is not allowed; give one of {allowed}.{hint}")


def check_products(precision: Precision, device: torch.device, dtype: torch.dtype, owner: str = "") -> None:
    """Raise ValueError unless numbers of `dtype` can be multiplied at `precision` on `device`."""
    if precision == "float32":
        return
    check_precision(precision, owner)
    problem = refusal(precision, device, dtype)
    if problem:
        start = f"{owner}: " if owner else ""
        raise ValueError(f"{start}precision={precision!r} is not allowed: {problem}; give precision='float32'")


def refusal(precision: Precision, device: torch.device, dtype: torch.dtype) -> str:
    """Why numbers of `dtype` can't be multiplied at `precision` on `device`; empty where they can."""
    if precision == "float32":
        return ""
    if dtype == torch.float64:
        return "the memories are float64, whose products would lose most of their digits"
    if device.type == "meta" or (device.type == "cpu" and precision == "bfloat16"):
        return ""
    if device.type != "cuda":
        where = "CUDA devices" if precision == "tf32" else "CUDA devices and CPUs"
        return f"the device is {str(device)!r}, and only {where} have such products here"
    if not torch.cuda.is_available():
        return ""  # a fake tensor, which stands for one on a device that is elsewhere
    name, major, minor = _cuda(device.index)
    if major >= LEAST_CAPABILITY:
        return ""
    return f"{device} ({name}) has a compute capability of {major}.{minor}, and it takes {LEAST_CAPABILITY}.0 or more"


@constant_in_graphs
def _cuda(index: int | None) -> tuple[str, int, int]:
    """Return the name and the compute capability of a CUDA device."""
    return torch.cuda.get_device_name(index), *torch.cuda.get_device_capability(index)


# -- which it is, here and now -----------------------------------------------------------------------------------------


class _Now(threading.local):
    """What each thread has for itself."""

    precision: Precision = "float32"


_now = _Now()


def current() -> Precision:
    """Return the precision at which `matmul` multiplies on this thread."""
    return _now.precision


class products_in:
    """Within this, `matmul` multiplies at `precision` on this thread.

    >>> with products_in("bfloat16"):
    ...     print(matmul(torch.tensor([[1.001]]), torch.tensor([[1.0]])))  # 7 bits of mantissa
    tensor([[1.]])
    """

    def __init__(self, precision: Precision) -> None:
        self.precision: Precision = precision

    def __enter__(self) -> None:
        self.before = _now.precision
        _now.precision = self.precision

    def __exit__(self, *error: object) -> None:
        _now.precision = self.before


# -- products ----------------------------------------------------------------------------------------------------------

Product = Callable[[Tensor, Tensor], Tensor]
"""Multiplies two matrices, or as many of both, as `torch.matmul`."""


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a b, as `torch.matmul`; of float32 numbers at the precision that `products_in` says."""
    return _matmul_at(a, b, _now.precision)


def product() -> Product:
    """Return `matmul` at the precision of here and now: for many products, and for their backward passes."""
    return _PRODUCTS[_now.precision]


def _matmul_at(a: Tensor, b: Tensor, precision: Precision) -> Tensor:
    if precision == "float32" or a.dtype != torch.float32 or b.dtype != torch.float32:
        return a @ b
    return _of_any_shape(a, b, precision)


_PRODUCTS: dict[Precision, Product] = {
    "float32": torch.matmul,
    "tf32": functools.partial(_matmul_at, precision="tf32"),
    "bfloat16": functools.partial(_matmul_at, precision="bfloat16"),
}


def plus_matmul(total: Tensor, a: Tensor, b: Tensor, multiply: Product | None = None) -> Tensor:
    """total + a b, as `torch.baddbmm`; `multiply` is a `product()`, by default that of here and now."""
    multiply = multiply or product()
    return torch.baddbmm(total, a, b) if multiply is torch.matmul else total + multiply(a, b)


def plus_matmul_(total: Tensor, a: Tensor, b: Tensor, multiply: Product | None = None) -> Tensor:
    """`plus_matmul`, in place."""
    multiply = multiply or product()
    return total.baddbmm_(a, b) if multiply is torch.matmul else total.add_(multiply(a, b))


def _of_any_shape(a: Tensor, b: Tensor, precision: Precision) -> Tensor:
    """What has more dimensions than a product takes, in one all the same; vectors as matrices of one row or column."""
    if b.ndim == 1:
        return _of_any_shape(a, b[:, None], precision)[..., 0]
    if a.ndim == 1:
        return _of_any_shape(a[None], b, precision)[..., 0, :]
    if a.ndim == b.ndim == 2:
        return _product(a, b, precision)
    if b.ndim == 2:
        return _product(a.flatten(0, -2), b, precision).view(*a.shape[:-1], b.shape[-1])
    if a.ndim == 2:
        return _of_any_shape(b.mT, a.mT, precision).mT
    lead = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    one, two = (x.expand(*lead, *x.shape[-2:]).flatten(0, -3) for x in (a, b))
    return _product(one, two, precision).view(*lead, a.shape[-2], b.shape[-1])


def _product(a: Tensor, b: Tensor, precision: Precision) -> Tensor:
    """Return `[n, k]` times `[k, m]`, or as many of both."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return _Product.apply(a, b, precision)
    return _multiplied(a, b, precision)  # nobody asks for a derivative, or for many at once


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(a: Tensor, b: Tensor, precision: Precision) -> Tensor:
        return _multiplied(a, b, precision)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        a, b, ctx.precision = inputs
        ctx.save_for_backward(a, b)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        to_a = _product(grad, b.mT, ctx.precision) if ctx.needs_input_grad[0] else None
        to_b = _product(a.mT, grad, ctx.precision) if ctx.needs_input_grad[1] else None
        return to_a, to_b, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, a: Tensor, b: Tensor, precision: Precision) -> tuple[Tensor, int]:
        one, two = (x if dim is None else x.movedim(dim, 0) for x, dim in zip((a, b), in_dims, strict=False))
        return _of_any_shape(one, two, precision), 0


def _multiplied(a: Tensor, b: Tensor, precision: Precision) -> Tensor:
    if precision == "tf32":
        if torch.compiler.is_compiling():  # the switch is not for a graph: what it says is asked when the graph runs
            return _tf32_product(a, b)
        with _tf32():
            return a @ b
    a, b = a.bfloat16(), b.bfloat16()
    if a.device.type == "cpu":
        return (a @ b).float()
    return (torch.mm if a.ndim == 2 else torch.bmm)(a, b, out_dtype=torch.float32)


class EveryProduct(TorchFunctionMode):
    """Within this, the products of modules that others wrote are `matmul`s: those of linear layers, and `@`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func is F.linear:
            return _linear(*args, **given)
        if func is torch.addmm and not given:
            return args[0] + matmul(args[1], args[2])
        if func in (torch.matmul, Tensor.matmul, Tensor.__matmul__) and not given:
            return matmul(*args)
        return func(*args, **given)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y = matmul(input, weight.mT)
    return y if bias is None else y + bias


# -- TF32: torch has one switch for all threads ------------------------------------------------------------------------


class _Switch:
    """How many products are being made in TF32, and what torch is to be put back to after the last of them."""

    def __init__(self) -> None:
        self.lock, self.products, self.before = threading.Lock(), 0, ""


_switch = _Switch()


def tf32_is_on() -> bool:
    """Return whether torch makes a float32 product that is dispatched now a TF32 one, on a device that has it."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


@contextlib.contextmanager
def _tf32() -> Iterator[None]:
    with _switch.lock:
        if not _switch.products:
            _switch.before = torch.backends.cuda.matmul.fp32_precision
            torch.backends.cuda.matmul.fp32_precision = "tf32"
        _switch.products += 1
    try:
        yield
    finally:
        with _switch.lock:
            _switch.products -= 1
            if not _switch.products:
                torch.backends.cuda.matmul.fp32_precision = _switch.before


@torch.library.custom_op("nestopt::tf32_product", mutates_args=(), schema="(Tensor a, Tensor b) -> Tensor")
def _tf32_product(a: Tensor, b: Tensor) -> Tensor:
    with _tf32():
        return a @ b


@_tf32_product.register_fake
def _(a: Tensor, b: Tensor) -> Tensor:
    return a @ b
