"""The order in which documents are read: shuffled, without end, and a pure function of a few numbers."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

SPREAD = 4
"""Pieces that each row has of an epoch, at least: rows then come to its end at about the same time."""


class Piece(NamedTuple):
    """The documents `part`, `part + parts`, `part + 2 · parts`, … of a block."""

    block: int
    part: int
    parts: int


@dataclasses.dataclass(frozen=True)
class Order:
    """Which documents each row of the batch reads, one after the other.

    In each epoch the blocks of the data are permuted and dealt out to the rows, and documents are permuted within their
    block, `shuffle` at a time. Where there are few blocks for the rows, a block is dealt out in several pieces. Every
    document is in one row of an epoch. Nothing here depends on how many processes there are.

    Attributes:
        seed: of all permutations.
        rows: in the batch.
        blocks: of the data.
        shuffle: documents that are permuted together.
    """

    seed: int
    rows: int
    blocks: int
    shuffle: int

    @property
    def parts(self) -> int:
        """Into how many pieces each block is cut."""
        return -(-SPREAD * self.rows // self.blocks) if self.blocks < SPREAD * self.rows else 1

    def pieces(self, epoch: int, row: int) -> list[Piece]:
        """Return what a row reads in an epoch."""
        dealt = permutation(f"{self.seed}:{epoch}", self.blocks * self.parts)[row :: self.rows]
        return [Piece(*divmod(int(number), self.parts), self.parts) for number in dealt]

    def documents(self, epoch: int, piece: Piece, group: int, texts: Iterable[str]) -> Iterator[list[str]]:
        """Yield the documents of a piece in the order of reading, from its group `group` on, group by group.

        Args:
            epoch: in which they are read.
            piece: of a block.
            group: how many groups of `shuffle` documents are passed over.
            texts: of the whole block.
        """
        own = islice(texts, piece.part, None, piece.parts)
        rest = islice(own, group * self.shuffle, None)
        while found := list(islice(rest, self.shuffle)):
            key = f"{self.seed}:{epoch}:{piece.block}:{piece.part}:{group}"
            yield [found[i] for i in permutation(key, len(found))]
            group += 1


def permutation(key: str, count: int) -> npt.NDArray[np.int64]:
    """Sort the numbers from 0 to count - 1 by a hash of theirs that `key` decides: the same everywhere, for ever."""
    first = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")
    # splitmix64, whose arithmetic is modulo 2**64
    x = np.arange(count, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(first)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.argsort(x ^ (x >> np.uint64(31)), kind="stable")


def is_held_out(text: str, one_in: int) -> bool:
    """Return whether a document is held out: one in so many, by a hash of its text, so that copies are on one side."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") % one_in == 0
