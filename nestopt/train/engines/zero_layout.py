"""Read where parameters lie in DeepSpeed's optimizers off their own tables (0.19)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor

from nestopt.optim.sharded.optimizer import Placement, Sharded
from nestopt.optim.sharded.slices import Slice


def placements(engine: Any, optimizer: Sharded) -> tuple[list[Placement], Any]:
    """Return where an engine keeps the parameters of the `optimizer` it was made with, and its group of processes.

    Raises:
        RuntimeError: DeepSpeed keeps them in a way that is not known here.
    """
    theirs, names = engine.optimizer, {id(param): name for name, param in optimizer.models.items()}
    if hasattr(theirs, "fp32_partitioned_groups_flat"):
        return _stage3(theirs, names), theirs.dp_process_group
    if hasattr(theirs, "single_partition_of_fp32_groups"):
        return _stage12(theirs, names), theirs.real_dp_process_group[0]
    if hasattr(theirs, "fp32_groups_flat_partition"):
        return _bf16(theirs, names), theirs.real_dp_process_group[0]
    if theirs is optimizer or getattr(theirs, "optimizer", None) is optimizer:
        # whole, and in float32: the model's own parameters, or copies that took their place in the groups
        groups = enumerate(optimizer.param_groups)
        return [Placement(i, group["params"], group["params"]) for i, group in groups], engine.seq_data_parallel_group
    raise RuntimeError(f"DeepSpeed made a {type(theirs).__name__}, and where that keeps parameters is not known")


def _stage3(theirs: Any, names: Mapping[int, str]) -> list[Placement]:
    found = []
    for i, (params, flat) in enumerate(zip(theirs.fp16_groups, theirs.fp32_partitioned_groups_flat, strict=True)):
        rank, offset, table = dist.get_rank(theirs.dp_process_group), 0, []
        for param in params:
            part = param.partition_numel()
            start = min(rank * part, param.ds_numel)
            size = min(part, param.ds_numel - start)
            table.append(Slice(names[id(param)], tuple(param.ds_shape), start, size, 0, offset))
            offset += part
        found.append(Placement(theirs.sub_group_to_group_id[i], [flat], [flat.detach()], table))
    return found


def _stage12(theirs: Any, names: Mapping[int, str]) -> list[Placement]:
    found = []
    for i, flat in enumerate(theirs.single_partition_of_fp32_groups):
        # not `_hp_mapping`, which is wrong where round_robin_gradients is on
        part = int(theirs.partition_size[i])
        first = dist.get_rank(theirs.real_dp_process_group[i]) * part
        pairs = zip(theirs.round_robin_bit16_groups[i], theirs.round_robin_bit16_offsets[i], strict=True)
        table = []
        for param, offset in pairs:
            low, high = max(offset, first), min(offset + param.numel(), first + part)
            size = max(0, high - low)
            table.append(
                Slice(
                    names[id(param)],
                    tuple(param.shape),
                    low - offset if size else 0,
                    size,
                    0,
                    low - first if size else 0,
                )
            )
        found.append(Placement(i, [flat], [flat.detach()], table))
    return found


def _bf16(theirs: Any, names: Mapping[int, str]) -> list[Placement]:
    found = []
    for i, flat in enumerate(theirs.fp32_groups_flat_partition):
        table = []
        for param in theirs.bf16_groups[i]:
            where = param._hp_mapping
            if where is None:
                table.append(Slice(names[id(param)], tuple(param.shape), 0, 0))
                continue
            here, there = where.lp_fragment_address, where.hp_fragment_address
            table.append(
                Slice(names[id(param)], tuple(param.shape), int(here.start), int(here.numel), 0, int(there.start))
            )
        found.append(Placement(i, [flat], [flat.detach()], table))
    return found


def spread(engine: Any) -> None:
    """Let the model have what was written to DeepSpeed's float32 tensors."""
    theirs = engine.optimizer
    if hasattr(theirs, "fp32_partitioned_groups_flat"):
        for i, flat in enumerate(theirs.fp32_partitioned_groups_flat):
            theirs.fp16_partitioned_groups_flat[i].data.copy_(flat.data)
            theirs._unflatten_partitioned_parameters(i)
    elif hasattr(theirs, "update_lp_params"):
        theirs.update_lp_params()
    elif hasattr(theirs, "fp32_groups"):
        for low, high in zip(theirs.fp16_groups, theirs.fp32_groups, strict=True):
            _copy(low, high)


def _copy(low: list[Tensor], high: list[Tensor]) -> None:
    for to, of in zip(low, high, strict=True):
        to.data.copy_(of.data)
