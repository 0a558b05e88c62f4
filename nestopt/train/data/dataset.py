"""Where training text comes from, as a part that plugins can add to."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar, NoReturn, Protocol

import numpy as np
import numpy.typing as npt

from nestopt.core.part import Part
from nestopt.train.errors import CorpusError


class Text(Protocol):
    """Bytes to train on and bytes held out."""

    @property
    def name(self) -> str: ...
    @property
    def train(self) -> npt.NDArray[np.uint8]: ...
    @property
    def held_out(self) -> npt.NDArray[np.uint8]: ...


class TextCodec(Protocol):
    """What text is as tokens."""

    @property
    def vocab(self) -> int:
        """One more than the largest token."""
        ...

    def encode_prompt(self, text: str) -> Sequence[int]:
        """Return the begin of a document as tokens, with what marks it and no end."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Return tokens as text, without marks."""
        ...


class DocumentSet(TextCodec, Protocol):
    """Documents in blocks, each of which can be read by itself, and the tokens that they become.

    The library shuffles, holds out, packs and resumes. A set only has to give the same documents in the same order
    whenever a block is read, and to be picklable: background processes read it too.
    """

    @property
    def name(self) -> str: ...
    @property
    def blocks(self) -> int:
        """How many blocks there are. A block is read as a whole: some hundreds or thousands of documents are right."""
        ...

    @property
    def shuffle(self) -> int:
        """How many documents of a block are permuted together, in memory."""
        ...

    @property
    def held_out(self) -> int:
        """One document in so many is held out."""
        ...

    def texts(self, block: int) -> Iterator[str]:
        """Return the documents of a block, 0 … blocks - 1, in their order."""
        ...

    def encode(self, text: str) -> Sequence[int]:
        """Return a document as tokens, one or more, with what marks its begin and its end."""
        ...


class Dataset(Part):
    """A source of text: `load()` gives its training and held-out bytes."""

    kind: ClassVar[str] = "dataset"

    @abstractmethod
    def load(self) -> Text: ...


class DocumentDataset(Dataset):
    """A source of documents with a tokenizer: `documents()` gives them. It has no text in one piece."""

    @abstractmethod
    def documents(self) -> DocumentSet: ...

    def tokens(self) -> TextCodec:
        """Return its tokens, where no documents are asked for."""
        return self.documents()

    def load(self) -> NoReturn:
        """Raise CorpusError: there are no bytes."""
        raise CorpusError(f"{self.label} is a dataset of documents and tokens; text as bytes is needed here")
