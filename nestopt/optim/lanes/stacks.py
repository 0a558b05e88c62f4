"""Levels that need whole tensors: those of one shape are stacked, and take their step as one batch."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.func import vmap

from nestopt.core.clock import advance, advance_
from nestopt.core.level import Level
from nestopt.core.signal import Signal
from nestopt.core.tree import leaves, store
from nestopt.optim.lanes.lane import Lane, Member, Rates, check_shape, placed
from nestopt.optim.views import matrix_view, work_dtype

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
            directions = self._advance(level, shown.reshape(shape), Signal(step, params.reshape(shape), rates.lr))
        except _NotBatched as error:
            # `step` is pure, so nothing has changed; a mistake in it will be raised again, one by one
            self._alone = True
            log.info("%s can't be batched and runs one tensor at a time: %s", level.label, error)
            super().move(level, grads, rates, step)
            return
        rates.apply(params, directions.to(params.dtype).reshape(params.shape))
        torch._foreach_copy_(self.params, list(params.unbind()))

    def _advance(self, level: Level, grads: Tensor, signal: Signal) -> Tensor:
        if is_batched(level):
            directions = advance_(level, grads, self.tree, signal)
        else:
            step, lr = signal.step, signal.lr
            alone = vmap(lambda g, s, p: advance(level, g, s, Signal(step, p, lr)))
            try:
                directions, new = alone(grads, self.tree, signal.param)
            except RuntimeError as error:
                raise _NotBatched(str(error)) from error
            directions = store(self.tree, new, directions)
        check_shape(level, directions, grads)
        buffers = dict(leaves(self.tree))
        if any(buffers[path] is not buffer for path, buffer in self._buffers.items()):
            self._keep(buffers)  # it has grown
        return directions


class _NotBatched(Exception):
    """`vmap` does not take what a level does."""


def is_batched(level: Level) -> bool:
    """Whether `level` and all levels in it take stacks of tensors."""
    return level.batched and all(is_batched(part) for _, part in level.parts() if isinstance(part, Level))
