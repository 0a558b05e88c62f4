"""Slices to the owners of whole tensors, and back: one all-to-all each way."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nestopt.optim.sharded.slices import Slice, held


class Exchange:
    """The way of some parameters between the processes that have slices of them and those that own them.

    Args:
        tables: the slices of each process, in the group's order.
        owner: of each parameter, by name.
        names: which parameters; the same on all processes.
        group: of the processes.
    """

    def __init__(
        self, tables: Sequence[Sequence[Slice]], owner: Mapping[str, int], names: Sequence[str], group: Any
    ) -> None:
        self.group, self.rank = group, dist.get_rank(group)
        wanted = set(names)
        mine = [piece for piece in held(tables[self.rank]) if piece.name in wanted]
        self.leaving = [[piece for piece in mine if owner[piece.name] == to] for to in range(len(tables))]
        """What this process has of each owner's parameters."""
        self.coming = [
            [piece for piece in held(table) if piece.name in wanted and owner[piece.name] == self.rank]
            for table in tables
        ]
        """What each process has of the parameters that this one owns."""
        self._sent = [sum(piece.size for piece in pieces) for pieces in self.leaving]
        self._got = [sum(piece.size for piece in pieces) for pieces in self.coming]

    @property
    def sent(self) -> int:
        """How many numbers this process sends to others in a step: gradients and values there, values back."""
        return 2 * (sum(self._sent) - self._sent[self.rank]) + sum(self._got) - self._got[self.rank]

    def gather(self, sources: Sequence[Sequence[Tensor]]) -> Pending:
        """Begin to send slices of several tensors a parameter (its gradient, its values) to the owners."""
        parts = [piece.of(tensors) for pieces in self.leaving for tensors in sources for piece in pieces]
        packed, n = torch.cat(parts) if parts else sources[0][0].new_empty(0), len(sources)
        return self._exchange(packed, [n * s for s in self._sent], [n * s for s in self._got])

    def unpack(self, coming: Pending, sources: int) -> list[dict[str, Tensor]]:
        """Return what `gather` brings: for each source the whole tensors by name, in their true shapes."""
        received = coming.take()
        if sum(self._got) == 0:
            return [{} for _ in range(sources)]
        found: list[dict[str, Tensor]] = []
        parts = received.split([sources * s for s in self._got])
        for i in range(sources):
            whole: dict[str, Tensor] = {}
            for pieces, part, size in zip(self.coming, parts, self._got, strict=True):
                at = i * size
                for piece in pieces:
                    if piece.name not in whole:
                        whole[piece.name] = received.new_empty(math.prod(piece.shape))
                    whole[piece.name][piece.start : piece.start + piece.size] = part[at : at + piece.size]
                    at += piece.size
            shapes = {piece.name: piece.shape for pieces in self.coming for piece in pieces}
            found.append({name: tensor.view(shapes[name]) for name, tensor in whole.items()})
        return found

    def scatter(self, whole: Mapping[str, Tensor], like: Tensor) -> Pending:
        """Begin to send the owners' tensors back to where their slices are."""
        packed = [
            whole[piece.name].reshape(-1)[piece.start : piece.start + piece.size]
            for pieces in self.coming
            for piece in pieces
        ]
        return self._exchange(torch.cat(packed) if packed else like.new_empty(0), self._got, self._sent)

    def store(self, coming: Pending, tensors: Sequence[Tensor]) -> None:
        """Put what `scatter` brings where this process has its slices."""
        places = [piece.of(tensors) for pieces in self.leaving for piece in pieces]
        received = coming.take()
        if places:
            torch._foreach_copy_(places, list(received.split([place.numel() for place in places])))

    def _exchange(self, packed: Tensor, sent: list[int], got: list[int]) -> Pending:
        received = packed.new_empty(sum(got))
        work = dist.all_to_all_single(received, packed, got, sent, group=self.group, async_op=True)
        return Pending(received, packed, work)


class Pending:
    """What is on its way."""

    def __init__(self, received: Tensor, sent: Tensor, work: Any) -> None:
        self._held: tuple[Tensor, Tensor, Any] | None = (received, sent, work)

    def take(self) -> Tensor:
        """Return what has come, once it has; then nothing is held here."""
        assert self._held is not None
        received, _, work = self._held
        work.wait()
        self._held = None
        return received
