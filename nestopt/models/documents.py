"""Rows in which documents lie end to end: each document run as a sequence of its own.

A memory on tokens is written chunk by chunk and level by level on clocks that count from a sequence's first token, so a
document can't be had from the middle of a row without these. Documents are taken out of their rows instead, and run
side by side with those of about their length: padding at most doubles the tokens, whatever their lengths are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from nestopt.core.device import by_contract, upload
from nestopt.core.token_state import cat, index
from nestopt.core.tree import State
from nestopt.models.loss_signal import TAUGHT

SHORTEST = 64
"""Documents of at most so many tokens are run together."""

Run = Callable[[Tensor, State | None, Tensor | None], tuple[Tensor, State]]
"""Runs tokens `[n, L]` from a state (None: new sequences), with a mask `[n, L]` that is False behind each row's tokens,
to `[n, L, dim]` and the state."""


@dataclasses.dataclass(frozen=True)
class Pieces:
    """The documents of a batch, row by row; of one that began before the batch or ends after it, the piece in it.

    All on the CPU.

    Attributes:
        token: `[N]`, where in the flat batch each token stands, those of a piece as neighbours.
        first: `[P]`, which of these is the first of each piece.
        length: `[P]`, how many tokens each piece has.
        row: `[P]`, in which row it is.
        goes_on: `[P]`, whether it goes on from the state of its row.
    """

    token: Tensor
    first: Tensor
    length: Tensor
    row: Tensor
    goes_on: Tensor

    @staticmethod
    def of(starts: Tensor, mask: Tensor | None, goes_on: bool) -> Pieces:
        """Find those of a batch whose documents begin at `starts` `[B, T]`, all other rows anew unless it `goes_on`."""
        with by_contract("documents"):
            starts = starts.cpu()
            live = torch.ones_like(starts) if mask is None else mask.cpu()
        heads = live & (starts | (live.cumsum(1) == 1))
        token = live.flatten().nonzero()[:, 0]
        piece = heads.flatten().cumsum(0)[token] - 1
        row = heads.nonzero()[:, 0]
        length = torch.bincount(piece, minlength=len(row))
        continued = ~starts[heads] if goes_on else torch.zeros(len(row), dtype=torch.bool)
        return Pieces(token, length.cumsum(0) - length, length, row, continued)

    @property
    def last(self) -> Tensor:
        """`[P]`: whether it is the last of its row."""
        return torch.cat([self.row[1:], self.row.new_full((1,), -1)])[: len(self.row)] != self.row

    def in_rows(self, batch: int) -> bool:
        """Whether the `batch` rows are right as they are: each a single piece, and all go on or none does; or empty."""
        alone = len(self.row) == batch == len(self.row.unique()) and len(self.goes_on.unique()) == 1
        return alone or not len(self.row)


@dataclasses.dataclass(frozen=True)
class Group:
    """Pieces that are run side by side.

    Attributes:
        pieces: `[n]`, their numbers.
        goes_on: whether they go on from their rows' states.
        size: places for each.
    """

    pieces: Tensor
    goes_on: bool
    size: int


def run_documents(
    tokens: Tensor, pieces: Pieces, state: State | None, run: Run, begin: Callable[[int], State], lockstep: bool
) -> tuple[Tensor, State]:
    """Run each piece by itself.

    Args:
        tokens: `[B, T]`, or embeddings `[B, T, dim]`.
        pieces: of them.
        state: of the rows; None where all begin anew.
        run: runs some sequences.
        begin: makes the state of so many new sequences.
        lockstep: call `run` as often, and on rows as long, as for any other documents in rows of these T. `state` is
            None then, and no state is made: where weights are in pieces, one that still has them can't be cut.

    Returns:
        `[B, T, dim]`, zeros at padding, and the state of each row's last document; of rows without tokens, as it was.
    """
    batch, length = tokens.shape[:2]
    device, last = tokens.device, pieces.last
    found, where, states, rows = [], [], [], []
    for group in _groups(pieces, length, lockstep):
        inside = torch.arange(group.size) < pieces.length[group.pieces][:, None]
        at = (pieces.first[group.pieces][:, None] + torch.arange(group.size)) * inside
        n = len(group.pieces)
        if n == 0:  # in lockstep: one sequence without a token
            n, inside, at = 1, inside.new_zeros(1, group.size), at.new_zeros(1, group.size)
        taken = upload(pieces.token[at], device)
        own = None
        if group.goes_on:
            assert state is not None
            own = index(state, pieces.row[group.pieces])
        mask = None if bool(inside.all()) and not lockstep else upload(inside, device)
        x, new = run(tokens.flatten(0, 1)[taken], own, mask)
        places = inside.flatten().nonzero()[:, 0]
        found.append(x.flatten(0, 1)[upload(places, device)])
        where.append(pieces.token[at.flatten()[places]])
        ends = last[group.pieces].nonzero()[:, 0]
        if len(ends) and not lockstep:
            rows.append(pieces.row[group.pieces[ends]])
            states.append(new if len(ends) == n else index(new, ends))
    some = torch.cat(found)
    x = some.new_zeros(batch * length, some.shape[-1]).index_copy(0, upload(torch.cat(where), device), some)
    x = x.unflatten(0, (batch, length))
    if lockstep:
        return x, {}
    still = torch.ones(batch, dtype=torch.bool).index_fill(0, pieces.row, False).nonzero()[:, 0]
    if len(still):
        rows.append(still)
        states.append(begin(len(still)) if state is None else index(state, still))
    order = torch.cat(rows).argsort()
    together = states[0] if len(states) == 1 else cat(_alike(states))
    return x, index(together, order)


def _groups(pieces: Pieces, length: int, lockstep: bool) -> Iterator[Group]:
    """Pieces by length: those of more than half of the places of the batch, of more than a quarter, and so on."""
    for goes_on in (False,) if lockstep else (False, True):
        size = length
        while True:
            below = 0 if size <= SHORTEST else -(-size // 2)
            fits = (pieces.length > below) & (pieces.length <= size) & (pieces.goes_on == goes_on)
            own = fits.nonzero()[:, 0]
            if lockstep:
                yield Group(own, goes_on, size)
            elif len(own):
                yield Group(own, goes_on, int(pieces.length[own].max()))
            if not below:
                break
            size = below


def _alike(states: list[State]) -> list[Mapping[str, Any]]:
    """States of which all or none carry a position that waits for its next token."""
    # of a segment that is open the state always has as many places
    if not any("live" in state.get(TAUGHT, {}) and state[TAUGHT]["live"].shape[1] for state in states):
        return list(states)
    return [{**state, TAUGHT: _with_place(state[TAUGHT])} for state in states]


def _with_place(carried: State) -> State:
    if carried["live"].shape[1]:
        return carried
    hidden, live = carried["hidden"], carried["live"]
    place = hidden.new_zeros(hidden.shape[0], 1, hidden.shape[2])
    inputs = {name: place.to(x.dtype) for name, x in carried["inputs"].items()}
    return {"inputs": inputs, "hidden": place, "live": live.new_zeros(live.shape[0], 1)}
