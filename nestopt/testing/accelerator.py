"""An accelerator's rules, held without one: meta tensors take its branches, and what would fail or wait there raises.

On a GPU these faults are met late or never: two devices in one operation, a host that waits for a number, a copy from
memory of the host, float64, and a fused kernel that reads another dtype than it is given.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nestopt.core.device import present_exception

WAITING = frozenset(
    {
        *("_local_scalar_dense", "is_nonzero", "equal", "histc", "bincount", "multinomial"),
        *("nonzero", "nonzero_numpy", "masked_select", "repeat_interleave.Tensor"),
        *("_unique2", "unique_dim", "unique_consecutive"),
        *("_linalg_eigh", "_linalg_check_errors", "_linalg_svd", "linalg_eig", "linalg_lstsq"),
    }
)
"""Operations whose CUDA kernels wait for the device: for a number, a shape, or whether they succeeded."""

_ASKING = frozenset({"item", "tolist", "__bool__", "__int__", "__float__", "__index__", "cpu", "numpy", "nonzero"})
_MAKING = frozenset({"tensor", "as_tensor", "asarray", "from_numpy", "new_tensor", "sparse_coo_tensor"})
_FUSED = frozenset({"_fused_adam_", "_fused_adamw_", "_fused_sgd_"})


class AcceleratorFault(AssertionError):
    """Something that an accelerator refuses, or waits for."""


@contextlib.contextmanager
def accelerator_rules() -> Iterator[list[str]]:
    """Raise AcceleratorFault for what would fail or wait on an accelerator, within this block.

    Run the code under test on tensors of the device `meta` (no data, no memory), once outside of the block, so that
    what is made once is there, and then within it. What is marked as by contract (`nestopt.core.device.by_contract`)
    passes, up to the number itself, which meta tensors do not have.

    Yields:
        What was found so far, in words: also what somebody has caught. At the end of the block it is raised.

    Raises:
        AcceleratorFault: at the first fault, in the forward pass or in the backward one.

    Example:
        >>> import nestopt
        >>> with torch.device("meta"):
        ...     layer, x = nestopt.layer("deltanet", dim=8, heads=2), torch.randn(1, 5, 8)
        >>> y, state = layer(x)
        >>> with accelerator_rules():
        ...     y, state = layer(x, state)
        ...     y.sum().backward()
    """
    found: list[str] = []
    with _Calls(found), _Operations(found):
        yield found
    if found:
        raise AcceleratorFault("; ".join(found))


def on_device(x: object) -> bool:
    """Return whether this is a tensor of another device than the host."""
    return isinstance(x, Tensor) and x.device.type != "cpu"


def _on_host(x: object) -> bool:
    return isinstance(x, Tensor) and x.device.type == "cpu"


class _Calls(TorchFunctionMode):
    """Calls of torch from Python that no operation shows: numbers that are asked for, or handed over."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _ASKING and args and on_device(args[0]) and present_exception() is None:
            _refuse(self.found, f"the host waits for the device ({name})")
        if name in ("__getitem__", "__setitem__") and on_device(args[0]) and _has_host_index(args[1]):
            _refuse(self.found, f"a list of the host's is copied to the device ({name})")
        if name in ("backward", "grad"):
            with self._without_mode():
                return func(*args, **kwargs)
        return self._made(func, *args, **kwargs)

    def _made(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        out = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        given = args[1:] if name == "new_tensor" else args
        if present_exception() is not None:
            return out
        if name in _MAKING and on_device(out) and not any(map(on_device, tree_leaves((given, kwargs)))):
            _refuse(self.found, f"numbers of the host's are copied to the device ({name})")
        return out

    @contextlib.contextmanager
    def _without_mode(self) -> Iterator[None]:
        """Look at what makes tensors also in a backward pass, which torch runs without this mode."""
        places: list[tuple[Any, str]] = [(torch, "tensor"), (torch, "as_tensor"), (Tensor, "new_tensor")]
        before = [(owner, name, getattr(owner, name)) for owner, name in places]

        def watched(make: Any) -> Any:
            return lambda *args, **kwargs: self._made(make, *args, **kwargs)

        for owner, name, make in before:
            setattr(owner, name, watched(make))
        try:
            yield
        finally:
            for owner, name, make in before:
                setattr(owner, name, make)


class _Operations(TorchDispatchMode):
    """Operations as the device would get them."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, given = func.overloadpacket.__name__, tree_leaves((args, kwargs))
        if any(map(on_device, given)) or on_device(kwargs and kwargs.get("out")):
            self._check(name, f"{name}.{func._overloadname}", args, kwargs, given)
        elif (
            name == "_to_copy"
            and present_exception() is None
            and torch.device((kwargs or {}).get("device") or "cpu").type != "cpu"
        ):
            _refuse(self.found, "a tensor of the host's is copied to the device (to)")
        out = func(*args, **(kwargs or {}))
        if any(on_device(x) and x.dtype in (torch.float64, torch.complex128) for x in tree_leaves(out)):
            _refuse(self.found, f"float64 on the device ({name})")
        return out

    def _check(self, name: str, overload: str, args: Any, kwargs: Any, given: list[Any]) -> None:
        if name == "copy_" and on_device(args[0]) and _on_host(args[1]):
            _refuse(self.found, "a tensor of the host's is copied to the device (copy_)")
        if name == "_to_copy" or (name == "copy_" and present_exception() is not None):
            return
        if (name in WAITING or overload in WAITING) and present_exception() is None:
            _refuse(self.found, f"the host waits for the device ({name})")
        if name in ("index", "index_put_", "index_put", "_index_put_impl_") and _masks(args):
            _refuse(self.found, f"the host waits for the device (a mask as an index, {name})")
        # one number may lie on the host: it is handed over with the launch
        listed = name.startswith("_foreach") or name in _FUSED
        if any(_on_host(x) and (x.ndim or listed) for x in given):
            _refuse(self.found, f"two devices in one operation ({name})")
        if name in _FUSED:
            self._check_fused(name, args, given, [(kwargs or {}).get("lr")])

    def _check_fused(self, name: str, args: Any, given: list[Any], rates: list[Any]) -> None:
        steps = args[5] if name != "_fused_sgd_" else []
        if any(step.dtype != torch.float32 for step in steps):
            _refuse(self.found, f"{name} reads its step counts as float32, and they are {steps[0].dtype}")
        if any(isinstance(rate, Tensor) and on_device(rate) and rate.dtype != torch.float32 for rate in rates):
            _refuse(self.found, f"{name} reads a learning rate as float32")
        dtypes = {x.dtype for x in given if isinstance(x, Tensor) and x.ndim}
        if len(dtypes) > 1:
            _refuse(self.found, f"{name} takes tensors of one dtype, and there are {sorted(map(str, dtypes))}")


def _masks(args: Any) -> bool:
    """Return whether an indexing takes a mask, and is not a fill with one number."""
    masked = any(isinstance(x, Tensor) and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    return masked and not (len(args) > 2 and args[2].numel() == 1)


def _has_host_index(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(part, list | np.ndarray) or (_on_host(part) and part.ndim > 0) for part in parts)


def _refuse(found: list[str], fault: str) -> None:
    found.append(fault)
    raise AcceleratorFault(fault)
