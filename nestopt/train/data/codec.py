"""Text as a run's model takes it, and its tokens as text while they come."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from nestopt.config import Config
from nestopt.train.data.dataset import DocumentDataset, TextCodec
from nestopt.train.data.sources import dataset_of


class StreamCodec(Protocol):
    """Text and tokens of one model."""

    def encode(self, text: bytes) -> Sequence[int]:
        """Return text, given in UTF-8, as tokens; nothing is none."""

    def add(self, token: int) -> str:
        """Return what text one more token adds."""

    def end(self) -> str:
        """Return what is left when no more come."""


class Bytes:
    """Bytes, each a token."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def encode(self, text: bytes) -> Sequence[int]:
        return list(text)

    def add(self, token: int) -> str:
        return self._decoder.decode(bytes([min(token, 255)]))

    def end(self) -> str:
        return self._decoder.decode(b"", final=True)


class Tokenized:
    """Tokens of a tokenizer, some of which are letters only together.

    Args:
        tokens: what text is as tokens.
    """

    def __init__(self, tokens: TextCodec) -> None:
        self.tokens = tokens
        self._all: list[int] = []
        self._shown = ""

    def encode(self, text: bytes) -> Sequence[int]:
        return self.tokens.encode_prompt(text.decode("utf-8", "replace")) if text else []

    def add(self, token: int) -> str:
        self._all.append(min(token, self.tokens.vocab - 1))
        text = self.tokens.decode(self._all)
        if text.endswith("\ufffd") or not text.startswith(self._shown):  # a letter that is not all there
            return ""
        new, self._shown = text[len(self._shown) :], text
        return new

    def end(self) -> str:
        return self.tokens.decode(self._all)[len(self._shown) :]


def codec_of(config: Config) -> StreamCodec:
    """Return the codec of a run of this configuration.

    Raises:
        CorpusError: its tokenizer can't be had.
    """
    dataset = dataset_of(config)
    return Tokenized(dataset.tokens()) if isinstance(dataset, DocumentDataset) else Bytes()
