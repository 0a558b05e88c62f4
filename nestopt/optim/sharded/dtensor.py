"""Parameters that `fully_shard` has cut up: where their rows lie."""

from __future__ import annotations

import math
from typing import Any

from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from nestopt.optim.sharded.optimizer import Placement, Sharded
from nestopt.optim.sharded.slices import Slice


def placements(optimizer: Sharded) -> list[Placement]:
    """Return where the DTensors of an optimizer lie.

    Raises:
        ValueError: a parameter is no DTensor, or is not cut by rows over one dimension of processes.
    """
    found = []
    for i, group in enumerate(optimizer.param_groups):
        tensors, table = [], []
        for j, (name, param) in enumerate(zip(optimizer.names[i], group["params"], strict=True)):
            table.append(_slice(name, param, j))
            tensors.append(param.detach().to_local())
        found.append(Placement(i, group["params"], tensors, table))
    return found


def _slice(name: str, param: Any, place: int) -> Slice:
    if not isinstance(param, DTensor) or param.device_mesh.ndim != 1 or tuple(param.placements) != (Shard(0),):
        how = f"{param.placements} on {param.device_mesh}" if isinstance(param, DTensor) else "not a DTensor"
        raise ValueError(f"{name} is {how}; give fully_shard a mesh of one dimension and its own placement, by rows")
    shape, offset = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
    row = math.prod(param.shape[1:])
    return Slice(name, tuple(param.shape), offset[0] * row, math.prod(shape), place)
