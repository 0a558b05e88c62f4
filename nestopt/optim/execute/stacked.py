"""Levels that need whole tensors: those of one shape are stacked, and take their step as one batch."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from nestopt.core.level import Level
from nestopt.core.signal import Signal
from nestopt.core.tree import State, leaves
from nestopt.optim.execute.update import Executor, Slot, UpdateSettings, placed, update, update_each_, wrong_shape
from nestopt.optim.views import advance_stack_, back, matrix_view

log = logging.getLogger("nestopt")


class Stacked(Executor):
    """Parameters of one shape; their states are slices `[i]` of one buffer `[n, *shape]` per key."""

    def __init__(self, level: Level, slots: Sequence[Slot]) -> None:
        super().__init__(level, slots)
        self.view, like = slots[0].view, self.params[0]
        self.as_is = self.view is None and (like.ndim < 3 or "matrix" not in level.needs)
        self.narrow = like.dtype != self.dtype
        self.direct, self.alone = level.is_batched and level.period == 1, False
        self.blind = self.direct and not level.needs_param
        self._keep({path: torch.stack(own) for path, own in self.leaves.items()})

    def _keep(self, buffers: Mapping[str, Tensor]) -> None:
        for i, slot in enumerate(self.slots):
            slot.keep({path: buffer[i] for path, buffer in buffers.items()})
        self.tree = placed(self.slots[0].tree, dict(buffers))
        self._cells = list(_cells(self.tree))
        self.note_leaves()

    def move(self, level: Level, grads: Sequence[Tensor], settings: UpdateSettings, step: int) -> None:
        if self.alone:
            super().move(level, grads, settings, step)
            return
        own, params = self.params, None
        if not self.as_is:
            grads, own = ([matrix_view(tensor, level, self.view) for tensor in each] for each in (grads, own))
        shown = torch.stack(list(grads)).to(self.dtype)
        if self.narrow or settings.coupled or not self.blind:
            params = torch.stack(own).to(self.dtype)
        if settings.maximize or settings.coupled:
            shown = settings.gradient(shown, params)
        signal = Signal(step, params, settings.lr)
        try:
            step_ = level.step_ if self.direct else partial(advance_stack_, level)
            directions = step_(shown, self.tree, signal)
        except RuntimeError as error:
            if level.is_batched:
                raise
            # `step` is pure, so nothing has changed; a mistake in it will be raised again, one by one
            self.alone = True
            log.info("%s can't be batched and runs one tensor at a time: %s", level.label, error)
            super().move(level, grads, settings, step)
            return
        if directions.shape != shown.shape:
            raise wrong_shape(level, directions, shown)
        moved = directions = directions.to(self.dtype)
        if params is not None and self.narrow:  # stepped in the wide dtype and rounded once
            moved = update(params, directions, settings.lr, settings.decay, out=params)
        apart = list(moved.unbind())
        if not self.as_is:
            apart = [back(one, param, self.view) for one, param in zip(apart, self.params, strict=True)]
        if self.narrow:
            torch._foreach_copy_(self.params, apart)
        else:
            update_each_(self.params, apart, settings.lr, settings.decay)
        if any(node[key] is not buffer for node, key, buffer in self._cells):
            self._keep(dict(leaves(self.tree)))  # it has grown


def _cells(tree: State) -> Iterator[tuple[State, str, Tensor]]:
    """Yield the place of every leaf: the dict that holds it, its key, and the leaf."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _cells(value)
        else:
            yield tree, key, value
