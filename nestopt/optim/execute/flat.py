"""Elementwise levels: large tensors are cut to pieces that stay in the cache, small ones are glued together."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from nestopt.core.clock import advance_
from nestopt.core.level import Level
from nestopt.core.signal import Signal
from nestopt.core.tree import State, leaves, tree_map
from nestopt.levels.gradient.fused import kernel_of
from nestopt.optim.execute.update import Executor, Slot, UpdateSettings, placed, update

SMALL = 1 << 16
"""Tensors of up to so many elements are glued together: above, the time of a kernel's launch no longer shows."""

PIECE = 1 << 18
"""Elements of a piece, per thread: the half dozen tensors of a stack of levels then share a core's part of the cache,
and a piece's work is still several times that of launching it."""


def flat(tensor: Tensor) -> Tensor:
    """Return the numbers of a dense tensor in the order they have in memory, as a view."""
    return tensor.view(-1) if tensor.is_contiguous() else tensor.as_strided((tensor.numel(),), (1,))


def is_dense(tensor: Tensor) -> bool:
    """Return whether the numbers of `tensor` fill its memory without gaps or overlaps, in whatever order."""
    return tensor.is_contiguous() or bool(torch.ops.aten.is_non_overlapping_and_dense(tensor))


class FlatBuffer:
    """Small parameters glued together: their states are views of one flat buffer per key."""

    def __init__(self, slots: Sequence[Slot], places: slice) -> None:
        self.places = places
        self.sizes = [slot.param.numel() for slot in slots]
        self.shapes = [slot.param.shape for slot in slots]
        buffers: dict[str, Tensor] = {}
        kept: list[dict[str, Tensor]] = [{} for _ in slots]
        for path, first in leaves(slots[0].tree):
            buffer = buffers[path] = first.new_empty(sum(self.sizes))
            for slot, view, own in zip(slots, self.cut(buffer), kept, strict=True):
                own[path] = view.copy_(slot.state[path])
        for slot, own in zip(slots, kept, strict=True):
            slot.keep(own)
        self.tree = placed(slots[0].tree, buffers)

    def cut(self, buffer: Tensor) -> list[Tensor]:
        """Return `buffer` as tensors in the shapes of the parameters."""
        return [part.view(shape) for part, shape in zip(buffer.split(self.sizes), self.shapes, strict=True)]


class Flat(Executor):
    """Parameters of an elementwise level. With `packed=False` small ones stay apart, as large ones are.

    Where torch has a kernel for the whole update and can read all parameters as they lie, that steps them at once.
    """

    whole: ClassVar[bool] = False
    """Whether large tensors are stepped without cutting them."""

    def __init__(self, level: Level, slots: Sequence[Slot], *, packed: bool = True) -> None:
        slots = sorted(slots, key=lambda slot: packed and slot.param.numel() > SMALL)
        small = sum(slot.param.numel() <= SMALL for slot in slots) if packed else 0
        self.buffers = [FlatBuffer(slots[part], part) for part in _portions([s.param.numel() for s in slots[:small]])]
        self.large = range(small, len(slots))
        for slot in slots[small:]:
            _lay_out_alike(slot)
        super().__init__(level, slots)
        self.kernel = kernel_of(level, self.params[0]) if all(map(Tensor.is_contiguous, self.params)) else None
        self._scratch: tuple[list[list[Tensor]], list[list[Tensor]], list[Tensor], list[Tensor]] | None = None

    def move(self, level: Level, grads: Sequence[Tensor], settings: UpdateSettings, step: int) -> None:
        if self.kernel is not None:
            dense = [grad if grad.is_contiguous() else grad.contiguous() for grad in grads]
            if self.kernel(level, self.params, dense, self.leaves, step, settings.numbers()):
                return
        if self.buffers:
            self._move_buffers(level, grads, settings, step)
        cut = self.params[0].device.type == "cpu" and not self.whole
        piece = PIECE * torch.get_num_threads() if cut else None
        for i in self.large:
            param, grad, tree = self.params[i], grads[i], self.slots[i].tree
            if grad.stride() != param.stride():
                grad = torch.empty_like(param, dtype=grad.dtype).copy_(grad)
            if piece is None or param.numel() <= piece:
                self.step_piece(level, flat(param), flat(grad), tree_map(flat, tree), settings, step)
                continue
            parts = zip(flat(param).split(piece), flat(grad).split(piece), _cut(tree, piece), strict=False)
            for p, g, part in parts:
                self.step_piece(level, p, g, part, settings, step)

    def _move_buffers(self, level: Level, grads: Sequence[Tensor], settings: UpdateSettings, step: int) -> None:
        grad_views, param_views, flat_grads, flat_params = self._scratch or self._make_scratch()
        for i, buffer in enumerate(self.buffers):
            params = self.params[buffer.places]
            torch._foreach_copy_(grad_views[i], list(grads[buffer.places]))
            torch._foreach_copy_(param_views[i], params)
            self.step_piece(level, flat_params[i], flat_grads[i], buffer.tree, settings, step)
            torch._foreach_copy_(params, param_views[i])

    def _make_scratch(self) -> tuple[list[list[Tensor]], list[list[Tensor]], list[Tensor], list[Tensor]]:
        """Make one place for gradients of a buffer and one for its parameters, which all buffers use in turn."""
        largest = max(sum(buffer.sizes) for buffer in self.buffers)
        grads, params = (torch.empty(largest, dtype=self.dtype, device=self.params[0].device) for _ in range(2))
        flat_grads, flat_params = ([own[: sum(b.sizes)] for b in self.buffers] for own in (grads, params))
        grad_views, param_views = (
            [buffer.cut(own) for buffer, own in zip(self.buffers, each, strict=True)]
            for each in (flat_grads, flat_params)
        )
        self._scratch = grad_views, param_views, flat_grads, flat_params
        return self._scratch

    def step_piece(
        self, level: Level, param: Tensor, grad: Tensor, state: State, settings: UpdateSettings, step: int
    ) -> None:
        """Step one piece in place. All are flat."""
        wide = param.to(self.dtype)
        shown, signal = settings.gradient(grad.to(self.dtype), wide), Signal(step, wide, settings.lr)
        if level.period == 1:
            level, shown, state = level.before_last_(shown, state, signal)
        done, kernel = False, kernel_of(level, wide)
        if kernel is not None:
            numbers = settings.numbers()._replace(coupled=0.0, maximize=False)  # as the gradient is shown already
            done = kernel(level, [wide], [shown], {key: [leaf] for key, leaf in state.items()}, step, numbers)
        if not done:
            update(wide, advance_(level, shown, state, signal), settings.lr, settings.decay, out=wide)
        if wide is not param:
            param.copy_(wide)


def _cut(tree: State, piece: int) -> Iterator[State]:
    """Yield `tree` once for every piece of its leaves, flattened."""
    keys = list(tree)
    if not keys:
        return itertools.repeat({})
    parts = [_cut(node, piece) if isinstance(node, dict) else flat(node).split(piece) for node in tree.values()]
    return (dict(zip(keys, each, strict=True)) for each in zip(*parts, strict=False))


def _portions(sizes: Sequence[int]) -> list[slice]:
    """Return runs of tensors that together fill a piece."""
    limit, found, start, total = PIECE * torch.get_num_threads(), [], 0, 0
    for i, size in enumerate(sizes):
        if total and total + size > limit:
            found.append(slice(start, i))
            start, total = i, 0
        total += size
    return [*found, slice(start, len(sizes))] if sizes else []


def _lay_out_alike(slot: Slot) -> None:
    """Lay the state out in memory as the parameter is, so that one order of numbers serves both."""
    param = slot.param
    other = {
        path: torch.empty_like(param, dtype=leaf.dtype).copy_(leaf)
        for path, leaf in leaves(slot.tree)
        if leaf.stride() != param.stride()
    }
    if other:
        slot.keep(other)
