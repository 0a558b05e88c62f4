"""What layers were shown in all processes together."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nestopt.core.inputs import LayerInputs
from nestopt.optim.inputs import Watcher


def total_inputs(watcher: Watcher, param: Tensor, shape: torch.Size, comm: Any) -> LayerInputs | None:
    """What a parameter of this true shape was multiplied with since the last take, in all processes; starts anew.

    All processes must ask for the same parameter. Rows are counted where they were seen, so that means are over all
    rows, however they were shared.
    """
    sums = watcher.sums(param)
    if sums is None:
        return None
    if comm is not None and dist.get_world_size(comm) > 1:
        sums.total(shape, param.device, lambda tensor: dist.all_reduce(tensor, group=comm))
    return sums.take(shape)
