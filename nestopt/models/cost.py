"""What a computation costs: multiplications, bytes moved and operations, counted on tensors that hold no data."""

from __future__ import annotations

import dataclasses
import functools
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from typing_extensions import Self

from nestopt.config import ModelConfig
from nestopt.core.precision import tf32_is_on
from nestopt.core.tree import leaves
from nestopt.models.build import build_model
from nestopt.models.one_kernel import one_kernel
from nestopt.nn.hope import Learn


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one run of some code, or of several on average.

    Attributes:
        products: floating-point operations of its matrix products, a multiplication and an addition each counted, by
            the dtype of their factors; `"tf32"` are float32 products that torch may compute in TensorFloat-32.
        bytes: read and written by all operations, as if nothing stayed in a cache.
        ops: operations that touch data: each is a kernel launch or more on an accelerator.
    """

    products: Mapping[str, float] = dataclasses.field(default_factory=dict)
    bytes: float = 0
    ops: float = 0

    @property
    def flops(self) -> float:
        """Of products in all dtypes."""
        return sum(self.products.values())

    def __add__(self, other: Cost) -> Cost:
        dtypes = {**self.products, **other.products}
        products = {dtype: self.products.get(dtype, 0) + other.products.get(dtype, 0) for dtype in dtypes}
        return Cost(products, self.bytes + other.bytes, self.ops + other.ops)

    def __mul__(self, times: float) -> Cost:
        return Cost({k: times * n for k, n in self.products.items()}, times * self.bytes, times * self.ops)


class CostCounter(TorchDispatchMode):
    """Count what the operations of a `with` block cost.

    Args:
        device: count only what touches tensors on this kind of device. With `"meta"`, which stands for an accelerator,
            what happens on the CPU beside it (a step count) is left out. Default: count everything.
    """

    def __init__(self, device: str | None = None) -> None:
        super().__init__()
        self.device = device
        self._products: Counter[str] = Counter()
        self._bytes = self._ops = 0

    def __enter__(self) -> Self:
        self._kernels = one_kernel()
        self._kernels.__enter__()
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._kernels.__exit__(*raised)

    @property
    def cost(self) -> Cost:
        """Of all operations until now."""
        return Cost(dict(self._products), self._bytes, self._ops)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.is_view or func.namespace in ("prim", "profiler") or func in _FREE:
            return out
        tensors = list(_tensors((args, *kwargs.values(), out)))
        if not any(self._counts(x) for x in tensors):
            return out
        if flops := _flops(func, args, kwargs, out):
            self._products[_product_dtype(tensors[0])] += flops
        self._bytes += _moved(func, args, kwargs, out)
        self._ops += 1
        return out

    def _counts(self, x: Tensor) -> bool:
        return self.device is None or x.device.type == self.device


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _product_dtype(factor: Tensor) -> str:
    if factor.dtype is torch.float32 and tf32_is_on():
        return "tf32"
    return str(factor.dtype).removeprefix("torch.")


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    packet = _IN_PLACE.get(func.overloadpacket, func.overloadpacket)
    if packet in flop_registry:
        if func._overloadname == "dtype":  # of the result, which torch's count does not expect among the factors
            args = args[:-1]
        return flop_registry[packet](*args, **kwargs, out_val=out)
    if packet is _ATTENTION:
        return sdpa_flop_count(*(x.shape for x in args[:3]))
    if packet is _ATTENTION_BACKWARD:
        return sdpa_backward_flop_count(*(x.shape for x in args[:4]))
    return 0


# those of other devices are in the registry
_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_aten = torch.ops.aten
_IN_PLACE = {_aten.addmm_: _aten.addmm, _aten.baddbmm_: _aten.baddbmm}
_FREE = {
    *(_aten.detach.default, _aten._unsafe_view.default, _aten.lift_fresh.default),
    # memory is taken, and nothing is written to it
    *(_aten.empty.memory_format, _aten.empty_like.default, _aten.empty_strided.default),
    *(_aten.new_empty.default, _aten.new_empty_strided.default),
}
_OVERWRITE = {"copy_", "fill_", "zero_", "normal_", "uniform_", "_foreach_copy_", "_foreach_zero_"}


def _moved(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    places, names, fresh = _passes(func)
    given = sum(times * _size(x) for times, x in zip(places, args, strict=False))
    return given + sum(names[key] * _size(x) for key, x in kwargs.items()) + (_size(out) if fresh else 0)


@functools.cache
def _passes(func: Any) -> tuple[Sequence[int], Mapping[str, int], bool]:
    """How often an operation goes over each argument, by place and by name, and whether what it returns is new."""
    names = {}
    for argument in func._schema.arguments:
        # fused kernels could unscale gradients, and are not asked to
        written = argument.alias_info is not None and argument.alias_info.is_write and argument.name != "grads"
        blind = argument.is_out or func.overloadpacket.__name__ in _OVERWRITE
        names[argument.name] = 2 if written and not blind else 1
    return list(names.values()), names, all(given.alias_info is None for given in func._schema.returns)


def _size(x: Any) -> int:
    if isinstance(x, list | tuple):
        return sum(map(_size, x))
    if not isinstance(x, Tensor):
        return 0
    # an expanded tensor is read where it is
    kept = [n for n, stride in zip(x.shape, x.stride(), strict=True) if stride]
    return x.element_size() * math.prod(kept)


def cost_of(run: Callable[[], object], device: str | None = None) -> Cost:
    """Return what `run` costs on a kind of device, or on all.

    Within a `FakeTensorMode`, and on meta tensors, nothing is computed and no memory needed, however large it is.
    """
    with CostCounter(device) as counter:
        run()
    return counter.cost


class Live(CostCounter):
    """Count bytes of all tensors that were made since and are still held, and what is done meanwhile costs.

    Tensors that were there before don't count.

    Args:
        device: count only tensors on this kind of device, and what touches them.

    Attributes:
        now: at present.
        peak: the most at a time, since the last `lap`.
        peak_else: the most at a time of all but those that have been `set_apart`, since the last `lap`.
    """

    def __init__(self, device: str | None = None) -> None:
        super().__init__(device)
        self.now = self.peak = self.peak_else = 0
        self._apart = 0
        self._sizes: dict[int, int] = {}
        self._set_apart: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func.is_view:
            return out
        made = [x for x in _tensors((out,)) if self._counts(x)]
        fresh = [x for x in made if x.untyped_storage()._cdata not in self._sizes]
        if fresh:
            # what an operation has written in place, or is a view of
            before = {x.untyped_storage()._cdata for x in _tensors((args, *(kwargs or {}).values()))}
            for x in fresh:
                self._note(x.untyped_storage(), before)
        return out

    def _note(self, storage: torch.UntypedStorage, before: set[int]) -> None:
        key = storage._cdata
        if key in before or key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        self.peak_else = max(self.peak_else, self.now - self._apart)
        weakref.finalize(storage, self._freed, key)

    def lap(self) -> tuple[int, int]:
        """Return `peak` and `peak_else`, and begin a new lap."""
        most = self.peak, self.peak_else
        self.peak, self.peak_else = self.now, self.now - self._apart
        return most

    def set_apart(self, tensor: Tensor) -> None:
        """Leave `tensor` out of `peak_else` from now on."""
        key = tensor.untyped_storage()._cdata
        if key in self._sizes and key not in self._set_apart:
            self._set_apart.add(key)
            self._apart += self._sizes[key]

    def _freed(self, key: int) -> None:
        size = self._sizes.pop(key)
        self.now -= size
        if key in self._set_apart:
            self._set_apart.remove(key)
            self._apart -= size


def peak_bytes(run: Callable[[], object]) -> int:
    """The most memory that tensors made by `run` take at a time. Within a `FakeTensorMode`, what they would take."""
    with Live() as live:
        run()
    return live.peak


def step_cost(section: ModelConfig, batch: int, window: int, *, learn: Learn = True) -> Cost:
    """Return the cost of a forward and a backward pass of a model on `batch` windows of `window` tokens."""
    with FakeTensorMode():
        model = build_model(section)
        tokens = torch.zeros(batch, window, dtype=torch.int64)

        def run() -> None:
            logits, _ = model(tokens, learn=learn)
            F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()

        return cost_of(run)


def state_bytes(section: ModelConfig) -> int:
    """How large the state of one sequence is before its first token: what a sequence needs besides the weights."""
    with FakeTensorMode():
        state = build_model(section).init_state(1)
    return sum(leaf.element_size() * leaf.numel() for _, leaf in leaves(state))
