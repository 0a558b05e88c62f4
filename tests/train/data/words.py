"""Documents of made-up words in memory, for tests of what is done with documents."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

END = 0


@dataclasses.dataclass
class Words:
    """`blocks` blocks of `per_block` documents. Each token tells which document and place it is of."""

    blocks: int = 6
    per_block: int = 10
    shuffle: int = 4
    held_out: int = 10**9
    name: str = "words"
    vocab: int = 1_000_000

    def texts(self, block: int) -> Iterator[str]:
        for i in range(self.per_block):
            number = block * self.per_block + i
            yield " ".join(str(1000 * (number + 1) + j) for j in range(1 + number * 7 % 23))

    def encode(self, text: str) -> Sequence[int]:
        return [*self.encode_prompt(text), END]

    def encode_prompt(self, text: str) -> Sequence[int]:
        return [int(word) for word in text.split()]

    def decode(self, tokens: Sequence[int]) -> str:
        return " ".join(str(token) for token in tokens if token != END)

    def all(self) -> set[str]:
        return {text for block in range(self.blocks) for text in self.texts(block)}
