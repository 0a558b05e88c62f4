"""torch's own fused kernels: one pass over memory for the whole update of a level."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nestopt.core.level import Level


class Numbers(NamedTuple):
    """What a kernel is told of the group.

    Attributes:
        lr: a number, or a tensor without dimensions, on an accelerator in float32.
        decay, coupled: weight decay that is taken off the parameter, or added to the gradient.
        maximize: ascend.
    """

    lr: float | Tensor
    decay: float | Tensor = 0.0
    coupled: float = 0.0
    maximize: bool = False


Tensors = Sequence[Tensor]
Memories = Mapping[str, Tensors]
"""By key of the state, of each parameter."""
Kernel = Callable[[Any, Tensors, Tensors, Memories, int | Tensors, Numbers], bool]
"""Steps parameters and their memories in place, as the level and `nestopt.optim.execute.update.update` do.

Called with the level, parameters, gradients and memories (of one device and dtype, contiguous), the count of all (or of
each, as a float32 tensor beside it), and numbers; False, and nothing has changed, where it does not take these numbers.
"""

KERNELS: dict[type[Level], Kernel] = {}
"""By the class of the level, and not of any that is derived from it, which may do something else."""


def kernel_of(level: Level, like: Tensor) -> Kernel | None:
    """Return torch's kernel for the whole update of `level` on tensors of such a dtype and device, if there is one."""
    return KERNELS.get(type(level)) if level.period == 1 and available(like) else None


def available(like: Tensor) -> bool:
    """Whether torch has the kernels for tensors of this dtype and device; those without data count as a GPU's."""
    return like.device.type in ("cpu", "cuda", "meta") and like.dtype in (torch.float32, torch.float64)


def reads(like: Tensor, others: Iterable[Tensor]) -> bool:
    """Whether the kernels can read these tensors: they take for granted that all are contiguous and of one dtype."""
    return like.is_contiguous() and all(other.dtype == like.dtype and other.is_contiguous() for other in others)


_meta = torch.library.Library("aten", "IMPL", "Meta")
for _kernel in ("_fused_adam_", "_fused_adamw_", "_fused_sgd_"):
    for _name in (_kernel, f"{_kernel}.tensor_lr"):
        # where torch has none: a step on tensors without data writes nothing
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{_name}", "Meta"):
            _meta.impl(_name, lambda *args, **kwargs: None)
