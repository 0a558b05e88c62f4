"""Where the numbers of parameters lie: which stretch of which parameter a process has, and in which tensor."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Slice:
    """A stretch of the numbers of one parameter, in the order of `flatten`, and where a process has it.

    Attributes:
        name, shape: of the parameter.
        start, size: the stretch.
        tensor: which of the process's tensors holds it.
        offset: from which number of that tensor on.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    size: int
    tensor: int = 0
    offset: int = 0

    @classmethod
    def whole(cls, name: str, shape: Sequence[int], tensor: int) -> Slice:
        """Return all of a parameter, which is that tensor."""
        return cls(name, tuple(shape), 0, math.prod(shape), tensor)

    @property
    def complete(self) -> bool:
        """Whether it is all of the parameter."""
        return self.size == math.prod(self.shape)

    def of(self, tensors: Sequence[Tensor]) -> Tensor:
        """Its numbers: a view `[size]` of the tensor that holds it."""
        return tensors[self.tensor].view(-1)[self.offset : self.offset + self.size]


def check_cover(tables: Sequence[Sequence[Slice]]) -> None:
    """Raise RuntimeError unless the slices of all processes together are every parameter, each number of it once."""
    found: dict[str, list[Slice]] = {}
    for piece in (piece for table in tables for piece in table):
        found.setdefault(piece.name, []).append(piece)
    for name, pieces in found.items():
        at = 0
        for piece in sorted(pieces, key=lambda piece: (piece.start, piece.size)):
            if piece.start != at or piece.shape != pieces[0].shape:
                break
            at += piece.size
        if at != math.prod(pieces[0].shape):
            raise RuntimeError(
                f"the processes' slices of {name} {list(pieces[0].shape)} do not make it up: "
                f"{sorted((piece.start, piece.size) for piece in pieces)} (start, size)"
            )


def held(table: Iterable[Slice]) -> list[Slice]:
    """Return the slices that are not empty."""
    return [piece for piece in table if piece.size]
