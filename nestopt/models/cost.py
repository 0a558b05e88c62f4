"""What a computation costs: multiplications, bytes moved and operations, counted on tensors that hold no data."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from nestopt.config import ModelConfig
from nestopt.core.tree import leaves
from nestopt.models.build import build_model
from nestopt.nn.hope import Learn


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one run of some code.

    Attributes:
        flops: of its matrix products, a multiplication and an addition each counted.
        bytes: read and written by all operations, as if nothing stayed in a cache.
        ops: operations that touch data.
    """

    flops: int = 0
    bytes: int = 0
    ops: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes, self.ops + other.ops)


class _Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.flops = self.bytes = self.ops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.is_view or func.namespace == "prim" or func in _FREE:
            return out
        packet = func.overloadpacket
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=out)
        elif packet is _ATTENTION:
            self.flops += sdpa_flop_count(*(x.shape for x in args[:3]))
        elif packet is _ATTENTION_BACKWARD:
            self.flops += sdpa_backward_flop_count(*(x.shape for x in args[:4]))
        self.bytes += sum(_size(x) for x in tree_leaves((args, kwargs, out)))
        self.ops += 1
        return out


# those of other devices are in the registry
_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_FREE = {torch.ops.aten.detach.default, torch.ops.aten._unsafe_view.default, torch.ops.aten.lift_fresh.default}


def _size(x: Any) -> int:
    if not isinstance(x, Tensor):
        return 0
    # an expanded tensor is read where it is
    kept = [n for n, stride in zip(x.shape, x.stride(), strict=True) if stride]
    return x.element_size() * int(torch.Size(kept).numel())


def cost_of(run: Callable[[], object]) -> Cost:
    """What `run` costs. Within a `FakeTensorMode` nothing is computed and no memory needed, however large it is."""
    with _Counter() as counter:
        run()
    return Cost(counter.flops, counter.bytes, counter.ops)


class _Live(TorchDispatchMode):
    """Bytes of all tensors that were made since and are still held."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if not isinstance(x, Tensor):
                continue
            storage = x.untyped_storage()
            if storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, storage._cdata)
        return out

    def _freed(self, key: int) -> None:
        self.now -= self.sizes.pop(key)


def peak_bytes(run: Callable[[], object]) -> int:
    """The most memory that tensors made by `run` take at a time. Within a `FakeTensorMode`, what they would take."""
    with _Live() as live:
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
