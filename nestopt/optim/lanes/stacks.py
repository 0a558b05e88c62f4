"""Levels that need whole tensors: those of one shape are stacked, and take their step as one batch."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from nestopt.core.level import Level
from nestopt.core.signal import Signal
from nestopt.core.tree import leaves
from nestopt.optim.lanes.lane import Lane, Member, Rates, check_shape, placed
from nestopt.optim.views import advance_stack_, matrix_view, work_dtype

log = logging.getLogger("nestopt")


class StackLane(Lane):
    """Members of one shape; their states are slices `[i]` of one buffer `[n, *shape]` per key."""

    def __init__(self, level: Level, members: Sequence[Member]) -> None:
        super().__init__(level, members)
        self._keep({path: torch.stack([state[path] for state in self.states]) for path, _ in leaves(members[0].tree)})
        self._alone = False

    def _keep(self, buffers: dict[str, Tensor]) -> None:
        for i, member in enumerate(self.members):
            member.keep({path: buffer[i] for path, buffer in buffers.items()})
        self.tree, self._buffers = placed(self.members[0].tree, buffers), buffers
        self.note_leaves()

    def move(self, level: Level, grads: Sequence[Tensor], rates: Rates, step: int) -> None:
        if self._alone:
            super().move(level, grads, rates, step)
            return
        first = self.params[0]
        params = torch.stack(self.params).to(work_dtype(first))
        shown = rates.gradient(torch.stack(list(grads)).to(params.dtype), params)
        shape = (len(self.params), *matrix_view(first, level).shape)
        try:
            signal = Signal(step, params.reshape(shape), rates.lr)
            directions = advance_stack_(level, shown.reshape(shape), self.tree, signal)
        except RuntimeError as error:
            if level.is_batched:
                raise
            # `step` is pure, so nothing has changed; a mistake in it will be raised again, one by one
            self._alone = True
            log.info("%s can't be batched and runs one tensor at a time: %s", level.label, error)
            super().move(level, grads, rates, step)
            return
        check_shape(level, directions, shown.reshape(shape))
        buffers = dict(leaves(self.tree))
        if any(buffers[path] is not buffer for path, buffer in self._buffers.items()):
            self._keep(buffers)  # it has grown
        rates.apply(params, directions.to(params.dtype).reshape(params.shape))
        torch._foreach_copy_(self.params, list(params.unbind()))
