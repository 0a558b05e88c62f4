"""Which members go together, and how."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from nestopt.core.level import Level
from nestopt.optim.lanes import pieces
from nestopt.optim.lanes.compiled import CompiledLane
from nestopt.optim.lanes.fused import FusedLane, has_kernel
from nestopt.optim.lanes.lane import STEP, Lane, Member
from nestopt.optim.lanes.pieces import PiecesLane, is_dense
from nestopt.optim.lanes.stacks import StackLane

STACK = 1 << 20
"""Elements of a stack at most, on the CPU: what its copies of gradients and parameters take is bounded by it."""

ACCELERATOR, ACCELERATOR_STACK = 1 << 23, 1 << 25
"""On an accelerator, tensors of up to so many elements are stacked (such as 1024 x 4224, of which one alone leaves most
of it idle), and a stack has so many at most: its copies take memory."""


def lanes_for(level: Level, members: Sequence[Member], *, packed: bool = True, compiled: bool = False) -> list[Lane]:
    """Every member in a lane.

    Args:
        level: what they run.
        members: any.
        packed: whether states may be moved into common buffers; not worth it where members come and go.
        compiled: whether to compile a kernel for what is elementwise and has none.
    """
    made: list[Lane] = []
    for alike in _by(members, lambda m: (int(m.state[STEP]), m.param.device, m.param.dtype)):
        whole, odd = _split(alike, lambda m: type(m.param) in (Tensor, nn.Parameter) and "inputs" not in level.needs)
        if level.is_entrywise:
            cut, apart = _split(whole, lambda m: (packed and m.param.numel() <= pieces.SMALL) or is_dense(m.param))
            odd += apart
            if cut:
                fused, others = _split(cut, lambda m: has_kernel(level, m.param))
                made += [FusedLane(level, fused, packed=packed)] if fused else []
                kind = CompiledLane if compiled else PiecesLane
                made += [kind(level, others, packed=packed)] if others else []
        else:
            on_cpu = alike[0].param.device.type == "cpu"
            limit, most = (pieces.SMALL, STACK) if on_cpu else (ACCELERATOR, ACCELERATOR_STACK)
            small, large = _split(whole, lambda m, limit=limit: packed and m.view is None and m.param.numel() <= limit)
            odd += large
            for same in _by(small, lambda m: m.param.shape):
                size = max(1, most // same[0].param.numel())
                stacks = -(-len(same) // size)
                for i in range(stacks):  # as even as can be
                    part = same[len(same) * i // stacks : len(same) * (i + 1) // stacks]
                    if len(part) > 1:
                        made.append(StackLane(level, part))
                    else:
                        odd += part
        if odd:
            made.append(Lane(level, odd))
    return made


def _by(members: Sequence[Member], key: Any) -> list[list[Member]]:
    groups: dict[Any, list[Member]] = {}
    for member in members:
        groups.setdefault(key(member), []).append(member)
    return list(groups.values())


def _split(members: Sequence[Member], condition: Any) -> tuple[list[Member], list[Member]]:
    return [m for m in members if condition(m)], [m for m in members if not condition(m)]
