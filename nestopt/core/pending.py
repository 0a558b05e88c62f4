"""Tokens of chunks that are not over, and rows of a batch that are at places of their own in a chunk."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nestopt.core.device import numbers_in, remember, told
from nestopt.core.tree import State, leaves, tree_map

PENDING = "pending"
"""Key of a state: the tokens of a chunk that is not over."""

COUNT = "count"
"""Key of pending tokens: how many each row has, `[B]`, which come first; where it is missing, all."""

OF_TOKENS = ("k", "v", "live")
"""What pending tokens are, but for their gates."""


@dataclasses.dataclass(frozen=True)
class RowChunks:
    """Where tokens stand so that each row's chunks are of its own tokens, wherever its padding is.

    First the chunks that are over, W places, where a row that has fewer is filled up with places that are no tokens;
    then what each row has of the chunk that is not over. A scan over chunks that begin together so gives every row what
    it has alone: a chunk without tokens changes nothing.

    Attributes:
        size: pending places of the state, which come before the call's T.
        order: `[B, W + R]`, which of these stands at each place.
        taken: `[B, W + R]`, whether that is a token of the row.
        whole: W, a multiple of the chunk.
        at: `[B, T]`, where each place of the call stands.
        here: `[B, T]`, whether it is a token: the mask.
        count: `[B]`, how many tokens the chunk that is not over has.
        numbers: these numbers, if the host knows them.
    """

    size: int
    order: Tensor
    taken: Tensor
    whole: int
    at: Tensor
    here: Tensor
    count: Tensor
    numbers: list[int] | None

    @staticmethod
    def of(pending: Mapping[str, Any] | None, mask: Tensor | None, tokens: Tensor, chunk: int) -> RowChunks | None:
        """Find the places of tokens `[B, H, T, ..]` after `pending` ones; None where no row has places of its own.

        Args:
            pending: of a state; None is none.
            mask: `[B, T]`, True for tokens; None is all.
            tokens: of the call, any tensor of them.
            chunk: tokens of a chunk.
        """
        held = None if pending is None else pending.get(COUNT)
        if chunk == 1 or (mask is None and held is None):
            return None
        batch, length, device = tokens.shape[0], tokens.shape[2], tokens.device
        size = 0 if pending is None else pending["live"].shape[2]
        place = torch.arange(size + length, device=device)
        here = mask if mask is not None else place[:length].expand(batch, -1) >= 0
        before = (place[:size] < (size if held is None else held[:, None])).expand(batch, -1)
        there = torch.cat([before, here], dim=1)
        rank = there.cumsum(1)
        total = rank[:, -1]
        numbers = _totals(held, length, total) if mask is None and held is not None else told(total)
        numbers = numbers or None  # of no rows there are none
        most = size + length if numbers is None else max(numbers)
        rest = min(chunk - 1, most) if numbers is None else max(number % chunk for number in numbers)
        whole, over = most - most % chunk, total - total % chunk
        rest = max(rest, int(whole == 0))  # a batch of padding alone has a place, too
        order = torch.argsort((~there).to(torch.int8), dim=1, stable=True)
        open_at = over[:, None] + place[:rest]
        at = (rank[:, size:] - 1).clamp_min(0)
        at = torch.where(at < over[:, None], at, at - over[:, None] + whole).clamp_max(whole + rest - 1)
        return RowChunks(
            size,
            torch.cat([order[:, :whole], order.gather(1, open_at.clamp_max(size + length - 1))], dim=1),
            torch.cat([place[:whole] < over[:, None], open_at < total[:, None]], dim=1),
            whole,
            at,
            here,
            total - over,
            None if numbers is None else sorted({number % chunk for number in numbers}),
        )

    def joined(self, pending: Mapping[str, Any] | None, fresh: Mapping[str, Any]) -> State:
        """Return `pending` tokens and `fresh` ones `[B, H, n, ..]` at their places: `[B, H, W + R, ..]`.

        Without the pending ones zeros stand at their places. Where there is no token, k, v and live are 0, and gates
        those of some token, so that they are in their range.
        """
        held = fresh if pending is None else {name: pending[name] for name in fresh}

        def of_both(old: Tensor, new: Tensor) -> Tensor:
            if pending is None:
                old = new.new_zeros(*new.shape[:2], self.size, *new.shape[3:])
            x = torch.cat([old.to(new.dtype), new], dim=2)
            return x.gather(2, of_shape(self.order, x))

        found = tree_map(of_both, held, fresh)
        for name in [name for name in ("q", *OF_TOKENS) if name in found]:
            found[name] = found[name].masked_fill(~of_shape(self.taken, found[name]), 0)
        return found

    @property
    def was_pending(self) -> Tensor:
        """`[B, W + R]`: whether a token is one of the pending ones."""
        return self.taken & (self.order < self.size)

    def back(self, y: Tensor) -> Tensor:
        """Return of `[B, H, W + R, ..]` what stands where the call's tokens are, `[B, H, T, ..]`, and 0 at padding."""
        found = y.gather(2, of_shape(self.at, y))
        return found.masked_fill(~of_shape(self.here, found), 0)

    def kept(self, rest: Mapping[str, Any]) -> State:
        """Return the tokens of the chunk that is not over, `[B, H, R, ..]`, as a state holds them."""
        count = self.count if self.numbers is None else remember(self.count, self.numbers)
        return settled({**rest, COUNT: count})


def _totals(held: Tensor, length: int, total: Tensor) -> list[int] | None:
    """Return the different numbers of tokens of rows that are all `length` longer, if the host knows or may wait.

    It waits, once in a stream, where tokens come one by one: then most of them need no write if it is known when.
    """
    numbers = told(held)
    if numbers is None and length == 1 and not (torch.compiler.is_compiling() or held.is_meta or _captured(held)):
        numbers = numbers_in(held)
    return None if numbers is None else [number + length for number in numbers]


def _captured(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def of_shape(places: Tensor, x: Tensor) -> Tensor:
    """Return `[B, n]` for each head and number of x `[B, H, .., ..]`."""
    places = places.reshape(places.shape[0], 1, places.shape[1], *(1,) * (x.ndim - 3))
    return places.expand(*x.shape[:2], places.shape[2], *x.shape[3:])


# -- pending tokens of a state -----------------------------------------------------------------------------------------


def count_of(pending: Mapping[str, Any]) -> Tensor:
    """Return how many tokens each row has, `[B]`."""
    if COUNT in pending:
        return pending[COUNT]
    batch, _, size = pending["live"].shape
    return remember(torch.full((batch,), size, dtype=torch.int64, device=pending["live"].device), [size])


def settled(pending: Mapping[str, Any]) -> State:
    """Return pending tokens without places that no row needs, and without a count if it is the same in all rows.

    Where only a device knows the counts they stay as they are.
    """
    counts = told(pending[COUNT]) if COUNT in pending else None
    if not counts:
        return dict(pending)
    found = tree_map(lambda x: x[:, :, : max(counts)], {name: x for name, x in pending.items() if name != COUNT})
    return found if len(counts) == 1 else {**found, COUNT: pending[COUNT]}


def all_settled(state: Mapping[str, Any]) -> State:
    """Return a state whose pending tokens are all `settled`."""
    return {
        key: settled(value) if key == PENDING else all_settled(value) if isinstance(value, Mapping) else value
        for key, value in state.items()
    }


def without(pending: State, rows: Tensor) -> State:
    """Return pending tokens of which `rows` `[B]` (bool) have none."""
    count = count_of(pending)
    left = torch.where(rows, 0, count)
    if told(left) is None and (counts := told(count)) is not None:
        left = remember(left, [0, *counts])
    return settled({**pending, COUNT: left})


def alike(states: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """States whose pending tokens have as many places; those that are added come last, and are not counted."""
    pending = [state[PENDING] for state in states]
    sizes = [held["live"].shape[2] for held in pending]
    if len(set(sizes)) == 1 and not any(COUNT in held for held in pending):
        return states
    most = max(pending, key=lambda held: held["live"].shape[2])
    filled: list[Mapping[str, Any]] = []
    for state, held, size in zip(states, pending, sizes, strict=True):
        own = {name: x for name, x in held.items() if name != COUNT}
        count = count_of(held)
        if size < max(sizes) and sorted(dict(leaves(own))) == sorted(set(dict(leaves(most))) - {COUNT}):

            def fill(x: Tensor, like: Tensor, size: int = size) -> Tensor:
                # gates in their range, though nothing comes of them: those of some token
                added = like[:1, :, size:].detach().expand(x.shape[0], *(-1,) * (x.ndim - 1))
                return torch.cat([x, added.to(x)], dim=2)

            own = tree_map(fill, own, most)
            for name in [name for name in OF_TOKENS if name in own]:
                own[name] = torch.cat([own[name][:, :, :size], torch.zeros_like(own[name][:, :, size:])], dim=2)
        filled.append({**state, PENDING: {**own, COUNT: count}})
    return filled
