"""What was read is to be given back, or what is known by heart (of MAD, Poli et al. 2024)."""

from __future__ import annotations

import functools
from typing import ClassVar

import torch
from torch import Tensor

from nestopt.train.data.task import Examples, Task, classes


class SelectiveCopy(Task):
    """Letters among blanks are to be written in their order, the blanks left out.

    Args:
        letters: to be copied.
        length: of letters and blanks together.
    """

    letters: int = 8
    length: int = 32
    KINDS: ClassVar[int] = 16
    """Of letters; then come the blank and the sign to write."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("letters", 1, self.length)

    @property
    def vocab(self) -> int:
        return self.KINDS + 2

    def draw(self, count: int, generator: torch.Generator, part: str = "train") -> Examples:
        places = torch.rand(count, self.length, generator=generator).argsort(-1)[:, : self.letters].sort(-1).values
        letters = torch.randint(self.KINDS, (count, self.letters), generator=generator)
        mixed = torch.full((count, self.length), self.KINDS).scatter(1, places, letters)
        tokens = torch.cat([mixed, torch.full_like(letters, self.KINDS + 1)], 1)
        asked = torch.arange(tokens.shape[1]) >= self.length
        return classes(tokens, asked, torch.cat([mixed, letters], 1))


class Compress(Task):
    """A string is to be known as a whole at one place, its end: which letter was at each position, all at once.

    Args:
        length: of the string, whose positions have letters of their own.
        kinds: letters that each position can have.
    """

    length: int = 16
    kinds: int = 8

    @property
    def vocab(self) -> int:
        return self.length * self.kinds + 1

    def draw(self, count: int, generator: torch.Generator, part: str = "train") -> Examples:
        drawn = torch.randint(self.kinds, (count, self.length), generator=generator)
        letters = drawn + self.kinds * torch.arange(self.length)
        tokens = torch.cat([letters, torch.full((count, 1), self.vocab - 1)], 1)
        targets = torch.full((count, self.length + 1, self.vocab), -100, dtype=torch.int8)
        targets[:, -1] = torch.zeros(count, self.vocab, dtype=torch.int8).scatter(1, letters, 1)
        return Examples(tokens, targets)


class Memorise(Task):
    """Values that no example shows: the same key has the same value in all of them.

    Args:
        facts: how many keys there are.
        length: keys of an example.
    """

    facts: int = 256
    length: int = 32
    VALUES: ClassVar[int] = 16

    @property
    def vocab(self) -> int:
        return self.facts

    def draw(self, count: int, generator: torch.Generator, part: str = "train") -> Examples:
        tokens = torch.randint(self.facts, (count, self.length), generator=generator)
        return Examples(tokens, _known(self.facts, self.VALUES)[tokens])


@functools.cache
def _known(facts: int, values: int) -> Tensor:
    return torch.randint(values, (facts,), generator=torch.Generator().manual_seed(0))
