"""How a parameter is shown to a level: in which dtype, and as which matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from nestopt.core.clock import start
from nestopt.core.level import Level
from nestopt.core.tree import State


def work_dtype(param: Tensor) -> torch.dtype:
    """Levels work, and keep their state, in float32 or wider."""
    return torch.float32 if param.dtype in (torch.float16, torch.bfloat16) else param.dtype


def matrix_view(tensor: Tensor, level: Level) -> Tensor:
    """`tensor` as `level` takes it: `[out, in·kh·kw]` for a convolution's kernel where the level needs matrices."""
    return tensor.flatten(1) if tensor.ndim > 2 and "matrix" in level.needs else tensor


def layout(level: Level, param: Tensor) -> State:
    """The state that `level` starts with on `param`, without its numbers: tensors on the meta device."""
    return start(level, matrix_view(torch.empty_like(param, device="meta", dtype=work_dtype(param)), level))
