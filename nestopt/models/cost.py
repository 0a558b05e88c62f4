"""What a computation costs: multiplications, bytes moved and operations, counted on tensors that hold no data."""

from __future__ import annotations

import dataclasses
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from nestopt.config import ModelConfig
from nestopt.core.precision import tf32_is_on
from nestopt.core.tree import leaves
from nestopt.models.build import build_model
from nestopt.nn.hope import Learn


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one run of some code.

    Attributes:
        products: floating-point operations of its matrix products, a multiplication and an addition each counted, by
            the dtype of their factors; `"tf32"` are float32 products that torch may compute in TensorFloat-32.
        bytes: read and written by all operations, as if nothing stayed in a cache.
        ops: operations that touch data: each is a kernel launch or more on an accelerator.
    """

    products: Mapping[str, int] = dataclasses.field(default_factory=dict)
    bytes: int = 0
    ops: int = 0

    @property
    def flops(self) -> int:
        """Of products in all dtypes."""
        return sum(self.products.values())

    def __add__(self, other: Cost) -> Cost:
        products = dict(Counter(self.products) + Counter(other.products))
        return Cost(products, self.bytes + other.bytes, self.ops + other.ops)


class CostCounter(TorchDispatchMode):
    """Count what the operations of a `with` block cost.

    Args:
        host: whether operations on the host's tensors count; not where meta tensors stand for an accelerator's, beside
            which the host keeps step counts.
    """

    def __init__(self, *, host: bool = True) -> None:
        super().__init__()
        self._host = host
        self._products: Counter[str] = Counter()
        self._bytes = self._ops = 0

    @property
    def cost(self) -> Cost:
        """Of all operations until now."""
        return Cost(dict(self._products), self._bytes, self._ops)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.is_view or func.namespace in ("prim", "profiler") or func in _FREE:
            return out
        tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
        if not self._host and all(x.device.type == "cpu" for x in tensors):
            return out
        if flops := _flops(func, args, kwargs, out):
            self._products[_product_dtype(tensors[0])] += flops
        self._bytes += sum(map(_size, tensors))
        self._ops += 1
        return out


def _product_dtype(factor: Tensor) -> str:
    if factor.dtype is torch.float32 and tf32_is_on():
        return "tf32"
    return str(factor.dtype).removeprefix("torch.")


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    packet = func.overloadpacket
    if packet in flop_registry:
        if func._overloadname == "dtype":  # of the result, which torch's count does not expect among the factors
            args = args[:-1]
        return flop_registry[packet](*args, **(kwargs or {}), out_val=out)
    if packet is _ATTENTION:
        return sdpa_flop_count(*(x.shape for x in args[:3]))
    if packet is _ATTENTION_BACKWARD:
        return sdpa_backward_flop_count(*(x.shape for x in args[:4]))
    return 0


# those of other devices are in the registry
_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_aten = torch.ops.aten
_FREE = {
    *(_aten.detach.default, _aten._unsafe_view.default, _aten.lift_fresh.default),
    # memory is taken, and nothing is written to it
    *(_aten.empty.memory_format, _aten.empty_like.default, _aten.empty_strided.default),
    *(_aten.new_empty.default, _aten.new_empty_strided.default),
}


def _size(x: Tensor) -> int:
    # an expanded tensor is read where it is
    kept = [n for n, stride in zip(x.shape, x.stride(), strict=True) if stride]
    return x.element_size() * int(torch.Size(kept).numel())


def cost_of(run: Callable[[], object]) -> Cost:
    """What `run` costs. Within a `FakeTensorMode` nothing is computed and no memory needed, however large it is."""
    with CostCounter() as counter:
        run()
    return counter.cost


class Live(TorchDispatchMode):
    """Bytes of all tensors that were made since and are still held; those that were there before don't count.

    Attributes:
        now: at present.
        peak: the most at a time.
        peak_else: the most at a time of all but those that have been `set_apart`.
        flops: of the matrix products meanwhile.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.peak_else = self.flops = 0
        self._apart = 0
        self._sizes: dict[int, int] = {}
        self._set_apart: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.is_view:
            return out
        self.flops += _flops(func, args, kwargs, out)
        made = [out] if isinstance(out, Tensor) else [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        fresh = [x for x in made if x.untyped_storage()._cdata not in self._sizes]
        if fresh:
            # what an operation has written in place, or is a view of
            given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
            before = {x.untyped_storage()._cdata for x in given}
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
    """The forward and backward pass of a model on `batch` windows of `window` tokens."""
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
