"""Documents end to end in rows: one stream of tokens for each row of the batch, which can be taken up at any token."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from nestopt.train.data.dataset import DocumentSet
from nestopt.train.data.order import Order, Piece, is_held_out
from nestopt.train.errors import CorpusError


@dataclasses.dataclass(frozen=True)
class Place:
    """The token that a row reads next.

    Attributes:
        epoch: how often the row has read all of its documents.
        piece: of the epoch's, by number.
        group: of the piece's groups of documents that are permuted together.
        document: in the group, as permuted.
        token: in the document.
    """

    epoch: int = 0
    piece: int = 0
    group: int = 0
    document: int = 0
    token: int = 0


class Packed(NamedTuple):
    """Some tokens of a row.

    Attributes:
        row: its number in the batch.
        tokens: `[n]` int64.
        starts: `[n]`, True at the first token of a document.
        place: of the token that the row reads next.
    """

    row: int
    tokens: npt.NDArray[np.int64]
    starts: npt.NDArray[np.bool_]
    place: dict[str, int]


class Row:
    """The stream of one row.

    Args:
        documents: the data.
        order: of reading.
        row: its number in the batch.
        place: of its next token.
    """

    def __init__(self, documents: DocumentSet, order: Order, row: int, place: Place) -> None:
        self.documents, self.order, self.row, self.place = documents, order, row, place
        self._rest = self._from(place)
        self._now: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self._token = 0

    def take(self, count: int) -> Packed:
        """Return the next `count` tokens, two or more. The last of them is the first that is taken the next time."""
        tokens, starts, filled = np.empty(count, dtype=np.int64), np.zeros(count, dtype=np.bool_), 0
        while filled < count:
            if self._token >= len(self._now):  # a place from a file may be behind the end
                self.place, self._now = next(self._rest)
                self._token = self.place.token
            some = self._now[self._token : self._token + count - filled]
            tokens[filled : filled + len(some)] = some
            starts[filled] = self._token == 0
            filled += len(some)
            self._token += len(some)
        self._token -= 1
        self.place = dataclasses.replace(self.place, token=self._token)
        return Packed(self.row, tokens, starts, dataclasses.asdict(self.place))

    def _from(self, place: Place) -> Iterator[tuple[Place, npt.NDArray[np.int64]]]:
        """Yield the documents from a place on, each with the place of its first token to be read."""
        while True:
            found = False
            pieces = self.order.pieces(place.epoch, self.row)
            for number in range(place.piece, len(pieces)):
                start = place if number == place.piece else Place(place.epoch, number)
                for now, text in self._texts(pieces[number], start):
                    found = True
                    yield now, np.asarray(self.documents.encode(text), dtype=np.int64)
            if not found and place == Place(place.epoch):
                raise CorpusError(
                    f"{self.documents.name}: in epoch {place.epoch} there is no document for row {self.row} of the "
                    f"{self.order.rows} of the batch; give more documents, or a smaller data.batch"
                )
            place = Place(place.epoch + 1)

    def _texts(self, piece: Piece, start: Place) -> Iterator[tuple[Place, str]]:
        one_in = self.documents.held_out
        texts = (t for t in self.documents.texts(piece.block) if t and not is_held_out(t, one_in))
        group, document, token = start.group, start.document, start.token
        for texts_ in self.order.documents(start.epoch, piece, group, texts):
            for number in range(document, len(texts_)):
                yield Place(start.epoch, start.piece, group, number, token), texts_[number]
                token = 0
            group, document = group + 1, 0


def held_out(documents: DocumentSet, most: int) -> tuple[list[str], int]:
    """Return whole held-out documents of at most so many bytes (or one, if it is longer), and their number of bytes.

    Blocks are read in an order that depends on nothing but their number, and no more of them than are needed.

    Raises:
        CorpusError: none is held out.
    """
    order = Order(seed=0, rows=1, blocks=documents.blocks, shuffle=1)
    found: list[str] = []
    size = 0
    for piece in order.pieces(0, 0):
        if piece.part:
            continue
        for text in documents.texts(piece.block):
            if not text or not is_held_out(text, documents.held_out):
                continue
            bytes_ = len(text.encode("utf-8", "surrogatepass"))
            if found and size + bytes_ > most:
                return found, size
            found.append(text)
            size += bytes_
    if not found:
        raise CorpusError(
            f"{documents.name}: no document is held out, with one in {documents.held_out}; give a smaller held_out"
        )
    return found, size
