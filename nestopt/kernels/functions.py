"""What the autograd functions here have in common."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def may_write() -> bool:
    """Whether a backward pass may write on gradients: not if it is differentiated itself, or traced by a compiler."""
    return not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def batched(function: type[torch.autograd.Function], info: Any, in_dims: Any, args: tuple[Any, ...]) -> Any:
    """Apply `function` under vmap, if it takes any leading dimensions: the new one is put before them.

    All inputs get it, also those that are the same for all: else the backward pass could not write on their gradients.
    """
    spread = [
        x if not isinstance(x, Tensor) else x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
        for x, dim in zip(args, in_dims, strict=True)
    ]
    outputs = function.apply(*spread)
    return outputs, (0,) * len(outputs) if isinstance(outputs, tuple) else 0
