"""How large a layer and its input are."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Size:
    """Attributes:
    tokens: in a sequence.
    chunk: tokens that a layer which works by chunks takes together.
    batch: sequences.
    dim: width of a token.
    heads: of the layers that have several.
    """

    tokens: int
    chunk: int
    batch: int = 2
    dim: int = 256
    heads: int = 4

    def words(self) -> str:
        return f"{self.tokens:,} tokens, chunks of {self.chunk}"


def tiny(tokens: int, chunk: int) -> Size:
    """A size at which to see that all of it runs."""
    return Size(tokens, chunk, batch=2, dim=16, heads=2)
