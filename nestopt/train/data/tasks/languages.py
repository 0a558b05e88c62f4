"""Formal languages, to be read further than they were learned: after each symbol the model says what may come next.

Targets are the set of legal symbols, the end among them where what was read is a word (Bhattamishra et al. 2020). A
string is right if all of its sets are. Models are trained on strings of up to 40 symbols.
"""

from __future__ import annotations

import itertools
import random
from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from nestopt.train.data.task import Examples, Task

LENGTHS = {"train": (1, 40), "41-100": (41, 100), "101-200": (101, 200)}
"""Of strings, by part."""


def _lengths(count: int, generator: torch.Generator, part: str) -> list[int]:
    low, high = LENGTHS[part]
    return torch.randint(low, high + 1, (count,), generator=generator).tolist()


class Language(Task):
    """A language, by what may follow: token 0 begins a string, target 1 is its end, and symbols come after them."""

    tests: ClassVar[tuple[str, ...]] = ("41-100", "101-200")
    whole: ClassVar[bool] = True
    alphabet: ClassVar[str]

    @property
    def vocab(self) -> int:
        return 2 + len(self.alphabet)

    start: ClassVar[Any] = 0
    """What is to be remembered before the first symbol."""

    @abstractmethod
    def step(self, state: Any, symbol: str) -> Any:
        """Return what is to be remembered after one more symbol."""

    @abstractmethod
    def legal(self, state: Any) -> str:
        """Return the symbols that may come next; `$` is the end."""

    def word(self, length: int, chance: random.Random) -> str:
        """Return a string of about so many symbols, which can be gone on with to a word."""
        state, word = self.start, ""
        while len(word) < length:
            word += chance.choice(self.legal(state).replace("$", ""))
            state = self.step(state, word[-1])
        return word

    def draw(self, count: int, generator: torch.Generator, part: str = "train") -> Examples:
        chance = random.Random(int(torch.randint(2**62, (), generator=generator)))
        words = [self.word(length, chance) for length in _lengths(count, generator, part)]
        return self.examples(words, LENGTHS[part][1] + 1)

    def examples(self, words: list[str], width: int) -> Examples:
        """Return strings as examples of `width` tokens, the first of which begins them."""
        numbers = {symbol: i for i, symbol in enumerate("$" + self.alphabet, start=1)}
        tokens, mask = torch.zeros(len(words), width, dtype=torch.long), torch.zeros(len(words), width).bool()
        targets = torch.zeros(len(words), width, self.vocab, dtype=torch.int8)
        places: list[tuple[int, int, int]] = []
        for row, word in enumerate(words):
            mask[row, : len(word) + 1] = True
            tokens[row, 1 : len(word) + 1] = torch.tensor([numbers[symbol] for symbol in word], dtype=torch.long)
            states = itertools.accumulate(word, self.step, initial=self.start)
            places += [(row, t, numbers[symbol]) for t, state in enumerate(states) for symbol in self.legal(state)]
        targets[tuple(torch.tensor(places).T)] = 1
        return Examples(tokens, targets, mask)


class Parity(Language):
    """Words over 0 and 1 with an even number of ones."""

    alphabet: ClassVar[str] = "01"

    def step(self, state: int, symbol: str) -> int:
        return state ^ (symbol == "1")

    def legal(self, state: int) -> str:
        return "01" if state else "01$"


class _Cycle(Language):
    cycle: ClassVar[str]

    def step(self, state: int, symbol: str) -> int:
        return (state + 1) % len(self.cycle)

    def legal(self, state: int) -> str:
        return self.cycle[state] + ("" if state else "$")


class AaStar(_Cycle):
    """(aa)*: an even number of a's."""

    alphabet: ClassVar[str] = "a"
    cycle: ClassVar[str] = "aa"


class AbabStar(_Cycle):
    """(abab)*: abab, again and again."""

    alphabet: ClassVar[str] = "ab"
    cycle: ClassVar[str] = "abab"


class AnBn(Language):
    """aⁿbⁿ, n >= 1: as many b's as there were a's."""

    alphabet: ClassVar[str] = "ab"
    start: ClassVar[Any] = (0, 0, 0)

    def step(self, state: tuple[int, int, int], symbol: str) -> tuple[int, int, int]:
        """Of (n, which letter is being written, how many of it)."""
        n, letter, count = state
        now = self.alphabet.index(symbol)
        count = count + 1 if now == letter else 1
        return (count if now == 0 else n), now, count

    def legal(self, state: tuple[int, int, int]) -> str:
        n, letter, count = state
        if letter == 0:
            return "ab" if n else "a"
        if count < n:
            return self.alphabet[letter]
        return (self.alphabet + "$")[letter + 1]

    def word(self, length: int, chance: random.Random) -> str:
        n = max(1, length // len(self.alphabet))
        return "".join(symbol * n for symbol in self.alphabet)


class AnBnCn(AnBn):
    """aⁿbⁿcⁿ, n >= 1."""

    alphabet: ClassVar[str] = "abc"


class Shuffle2(Language):
    """Two kinds of brackets, each balanced for itself."""

    alphabet: ClassVar[str] = "()[]"
    start: ClassVar[Any] = (0, 0)

    def step(self, state: tuple[int, int], symbol: str) -> tuple[int, int]:
        kind, down = divmod(self.alphabet.index(symbol), 2)
        change = -1 if down else 1
        return (state[0] + change * (kind == 0), state[1] + change * (kind == 1))

    def legal(self, state: tuple[int, int]) -> str:
        return "([" + (")" if state[0] else "") + ("]" if state[1] else "") + ("" if any(state) else "$")


class _Group(Task):
    """The product so far of the elements of a finite group, at each of them."""

    tests: ClassVar[tuple[str, ...]] = ("41-100", "101-200")
    whole: ClassVar[bool] = True
    table: ClassVar[Tensor]

    @property
    def vocab(self) -> int:
        return len(self.table)

    def draw(self, count: int, generator: torch.Generator, part: str = "train") -> Examples:
        width = LENGTHS[part][1]
        lengths = torch.tensor(_lengths(count, generator, part))
        tokens = torch.randint(self.vocab, (count, width), generator=generator)
        products = [tokens[:, 0]]
        for t in range(1, width):
            products.append(self.table[products[-1], tokens[:, t]])
        return Examples(tokens, torch.stack(products, 1), torch.arange(width) < lengths[:, None])


_S3 = list(itertools.permutations(range(3)))


class S3(_Group):
    """The symmetric group of three things: which permutation all those read so far make, one after another."""

    table: ClassVar[Tensor] = torch.tensor([[_S3.index(tuple(b[a[i]] for i in range(3))) for b in _S3] for a in _S3])


class Mod3(_Group):
    """The sum so far, modulo 3."""

    table: ClassVar[Tensor] = torch.tensor([[(a + b) % 3 for b in range(3)] for a in range(3)])
