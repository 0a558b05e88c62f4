"""Elementwise levels: large tensors are cut to pieces that stay in the cache, small ones are glued together."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from nestopt.core.clock import descend_
from nestopt.core.level import Level
from nestopt.core.signal import Signal
from nestopt.core.tree import State, leaves, tree_map
from nestopt.optim.lanes.lane import Lane, Member, Rates, placed
from nestopt.optim.views import work_dtype

SMALL = 1 << 16
"""Tensors of up to so many elements are glued together: above, the time of a kernel's launch no longer shows."""

PIECE = 1 << 18
"""Elements of a piece, per thread: the half dozen tensors of a stack of levels then share a core's part of the cache,
and a piece's work is still several times that of launching it."""


def flat(tensor: Tensor) -> Tensor:
    """The numbers of a dense tensor in the order they have in memory, as a view."""
    return tensor.view(-1) if tensor.is_contiguous() else tensor.as_strided((tensor.numel(),), (1,))


def is_dense(tensor: Tensor) -> bool:
    """Whether the numbers of `tensor` fill its memory without gaps or overlaps, in whatever order."""
    return tensor.is_contiguous() or bool(torch.ops.aten.is_non_overlapping_and_dense(tensor))


class Pack:
    """Small members glued together: their states are views of one flat buffer per key."""

    def __init__(self, members: Sequence[Member], places: slice) -> None:
        self.places = places
        self.sizes = [member.param.numel() for member in members]
        self._shapes = [member.param.shape for member in members]
        self.buffers: dict[str, Tensor] = {}
        kept: list[dict[str, Tensor]] = [{} for _ in members]
        for path, first in leaves(members[0].tree):
            buffer = self.buffers[path] = first.new_empty(sum(self.sizes))
            for member, view, own in zip(members, self.cut(buffer), kept, strict=True):
                own[path] = view.copy_(member.state[path])
        for member, own in zip(members, kept, strict=True):
            member.keep(own)
        self.tree = placed(members[0].tree, self.buffers)

    def cut(self, buffer: Tensor) -> list[Tensor]:
        """`buffer` as tensors in the shapes of the members."""
        return [part.view(shape) for part, shape in zip(buffer.split(self.sizes), self._shapes, strict=True)]


class PiecesLane(Lane):
    """Members of an elementwise level. With `packed=False` small ones stay apart, as large ones are."""

    whole: ClassVar[bool] = False
    """Whether large tensors are stepped without cutting them."""

    def __init__(self, level: Level, members: Sequence[Member], *, packed: bool = True) -> None:
        members = sorted(members, key=lambda member: packed and member.param.numel() > SMALL)
        small = sum(member.param.numel() <= SMALL for member in members) if packed else 0
        self.packs = [Pack(members[part], part) for part in _portions([m.param.numel() for m in members[:small]])]
        self.large = range(small, len(members))
        for member in members[small:]:
            _lay_out_alike(member)
        self._strides = [member.param.stride() for member in members[small:]]
        self._scratch: tuple[list[list[Tensor]], list[list[Tensor]], list[Tensor], list[Tensor]] | None = None
        super().__init__(level, members)

    def intact(self) -> bool:
        return super().intact() and self._strides == [self.params[i].stride() for i in self.large]

    def move(self, level: Level, grads: Sequence[Tensor], rates: Rates, step: int) -> None:
        if self.packs:
            self._move_packs(level, grads, rates, step)
        cut = self.params[0].device.type == "cpu" and not self.whole
        piece = PIECE * torch.get_num_threads() if cut else None
        for i in self.large:
            param, grad, tree = self.params[i], grads[i], self.members[i].tree
            if grad.stride() != param.stride():
                grad = torch.empty_like(param, dtype=grad.dtype).copy_(grad)
            if piece is None or param.numel() <= piece:
                self.descend(level, flat(param), flat(grad), tree_map(flat, tree), rates, step)
                continue
            parts = zip(flat(param).split(piece), flat(grad).split(piece), _cut(tree, piece), strict=False)
            for p, g, part in parts:
                self.descend(level, p, g, part, rates, step)

    def _move_packs(self, level: Level, grads: Sequence[Tensor], rates: Rates, step: int) -> None:
        grad_views, param_views, flat_grads, flat_params = self._scratch or self._make_scratch()
        for i, pack in enumerate(self.packs):
            params = self.params[pack.places]
            torch._foreach_copy_(grad_views[i], list(grads[pack.places]))
            torch._foreach_copy_(param_views[i], params)
            self.descend(level, flat_params[i], flat_grads[i], pack.tree, rates, step)
            torch._foreach_copy_(params, param_views[i])

    def _make_scratch(self) -> tuple[list[list[Tensor]], list[list[Tensor]], list[Tensor], list[Tensor]]:
        """One place for the gradients of a pack and one for its parameters, which all packs use in turn."""
        largest = max(sum(pack.sizes) for pack in self.packs)
        like = self.params[0]
        grads, params = (torch.empty(largest, dtype=work_dtype(like), device=like.device) for _ in range(2))
        flat_grads, flat_params = ([own[: sum(pack.sizes)] for pack in self.packs] for own in (grads, params))
        grad_views, param_views = (
            [pack.cut(own) for pack, own in zip(self.packs, each, strict=True)] for each in (flat_grads, flat_params)
        )
        self._scratch = grad_views, param_views, flat_grads, flat_params
        return self._scratch

    def descend(self, level: Level, param: Tensor, grad: Tensor, state: State, rates: Rates, step: int) -> None:
        """One step of one piece, in place. All are flat."""
        wide = param if param.dtype == work_dtype(param) else param.to(work_dtype(param))
        grad = grad if grad.dtype == wide.dtype else grad.to(wide.dtype)
        grad = grad if rates.plain else rates.gradient(grad, wide)
        descend_(level, wide, grad, state, Signal(step, wide, rates.lr), rates.lr, rates.decay)
        if wide is not param:
            param.copy_(wide)


def _cut(tree: State, piece: int) -> Iterator[State]:
    """`tree` once for every piece of its leaves, flattened."""
    keys = list(tree)
    if not keys:
        return itertools.repeat({})
    parts = [_cut(node, piece) if isinstance(node, dict) else flat(node).split(piece) for node in tree.values()]
    return (dict(zip(keys, each, strict=True)) for each in zip(*parts, strict=False))


def _portions(sizes: Sequence[int]) -> list[slice]:
    """Runs of tensors that together fill a piece."""
    limit, found, start, total = PIECE * torch.get_num_threads(), [], 0, 0
    for i, size in enumerate(sizes):
        if total and total + size > limit:
            found.append(slice(start, i))
            start, total = i, 0
        total += size
    return [*found, slice(start, len(sizes))] if sizes else []


def _lay_out_alike(member: Member) -> None:
    """Lay the state out in memory as the parameter is, so that one order of numbers serves both."""
    param = member.param
    other = {
        path: torch.empty_like(param, dtype=leaf.dtype).copy_(leaf)
        for path, leaf in leaves(member.tree)
        if leaf.stride() != param.stride()
    }
    if other:
        member.keep(other)
