"""What was read is asked for: pairs of keys and values, needles in text, and facts that lead to one another."""

from __future__ import annotations

import functools
from typing import ClassVar

import torch
from torch import Tensor

from nestopt.core.part import FieldError
from nestopt.train.data.task import Examples, Task, classes
from nestopt.train.data.text import standard_library


class Mqar(Task):
    """Multi-query associative recall (Arora et al. 2023): pairs of a key and a value, then keys, to be answered.

    Args:
        pairs: of different keys.
        tokens: of an example; 0, the default, is 8 for each pair.
        keys, values: how many there are.
    """

    pairs: int = 8
    tokens: int = 0
    keys: int = 32
    values: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("pairs", 1, self.keys)
        if self.tokens and (self.tokens % 2 or self.tokens < 2 * self.pairs + 2):
            allowed = f"is not allowed; give 0, or an even number of {2 * self.pairs + 2} or more"
            raise FieldError(self.label, "tokens", self.tokens, allowed)

    @property
    def vocab(self) -> int:
        return self.keys + self.values

    def draw(self, count: int, generator: torch.Generator, part: str = "train") -> Examples:
        n, length = self.pairs, self.tokens or 8 * self.pairs
        keys = torch.rand(count, self.keys, generator=generator).argsort(-1)[:, :n]
        values = self.keys + torch.randint(self.values, (count, n), generator=generator)
        which = torch.randint(n, (count, length // 2 - n), generator=generator)
        again = torch.stack([keys.gather(1, which), values.gather(1, which)], -1).flatten(1)
        tokens = torch.cat([torch.stack([keys, values], -1).flatten(1), again], 1)
        place = torch.arange(length - 1)
        asked = (place >= 2 * n) & (place % 2 == 0)
        return classes(tokens[:, :-1], asked, tokens[:, 1:])


class NoisyMqar(Mqar):
    """MQAR with pairs of noise, of letters of their own, anywhere among the others (MAD's noisy recall).

    Args:
        noise: how many such pairs.
    """

    noise: int = 8
    NOISES: ClassVar[int] = 16

    @property
    def vocab(self) -> int:
        return super().vocab + self.NOISES

    def draw(self, count: int, generator: torch.Generator, part: str = "train") -> Examples:
        tokens, targets, _ = super().draw(count, generator, part)
        assert targets is not None
        real = (tokens.shape[1] + 1) // 2
        slots = torch.rand(count, real + self.noise, generator=generator).argsort(-1)[:, :real].sort(-1).values
        places = (2 * slots[..., None] + torch.arange(2)).flatten(1)[:, :-1]
        wide = 2 * (real + self.noise)
        noise = super().vocab + torch.randint(self.NOISES, (count, wide), generator=generator)
        none = torch.full((count, wide), -100)
        return Examples(noise.scatter(1, places, tokens), none.scatter(1, places, targets))


@functools.cache
def _text() -> Tensor:
    return torch.from_numpy(standard_library().train).long().clamp_max(127)


class Needle(Task):
    """Needles in text: a few pairs, marked, anywhere in source code; at the end one of the keys is asked for.

    Args:
        length: of the text of an example; tests have the one that is asked for at its start, middle or end, and all
            anywhere in twice as much.
        needles: how many, of different keys.
    """

    length: int = 96
    needles: int = 4
    tests: ClassVar[tuple[str, ...]] = ("start", "middle", "end", "twice")
    MARK, KEYS, VALUES = 0, 16, 16

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("needles", 1, self.KEYS)
        self.check("length", 12 * self.needles)

    @property
    def vocab(self) -> int:
        return 128 + self.KEYS + self.VALUES

    def draw(self, count: int, generator: torch.Generator, part: str = "train") -> Examples:
        n, length = self.needles, self.length * (2 if part == "twice" else 1)
        at = torch.randint(len(_text()) - length, (count, 1), generator=generator) + torch.arange(length)
        slots = torch.rand(count, length // 3, generator=generator).argsort(-1)[:, :n].sort(-1).values
        keys = 128 + torch.rand(count, self.KEYS, generator=generator).argsort(-1)[:, :n]
        values = 128 + self.KEYS + torch.randint(self.VALUES, (count, n), generator=generator)
        which = torch.randint(n, (count, 1), generator=generator)
        if part in ("start", "middle", "end"):
            third = length // 9
            first = -(-("start", "middle", "end").index(part) * (length // 3) // 3)
            others = torch.rand(count, length // 3, generator=generator)
            others[:, first : first + third] = 2  # the one that is asked for is alone in its third
            slots = others.argsort(-1)[:, :n]
            slots.scatter_(1, which, first + torch.randint(third, (count, 1), generator=generator))
        needle = torch.stack([torch.full_like(keys, self.MARK), keys, values], -1)
        places = 3 * slots[..., None] + torch.arange(3)
        text = _text()[at].clamp_min(1).scatter(1, places.flatten(1), needle.flatten(1))
        asked = torch.cat([torch.full_like(which, self.MARK), keys.gather(1, which)], 1)
        tokens = torch.cat([text, asked], 1)
        last = torch.arange(length + 2) == length + 1
        return classes(tokens, last, values.gather(1, which).expand_as(tokens))


class Facts(Task):
    """Chains of facts x → y in any order; then some x, from which one is to go on to the end of its chain.

    Args:
        chains: how many, with no thing in two of them.
        hops: facts of a chain.
    """

    chains: int = 4
    hops: int = 2
    THINGS: ClassVar[int] = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("hops", 1)
        self.check("chains", 1, self.THINGS // (self.hops + 1))

    @property
    def vocab(self) -> int:
        return self.THINGS + 1

    def draw(self, count: int, generator: torch.Generator, part: str = "train") -> Examples:
        order = torch.rand(count, self.THINGS, generator=generator).argsort(-1)
        chains = order[:, : self.chains * (self.hops + 1)].view(count, self.chains, self.hops + 1)
        facts = torch.stack([chains[..., :-1], chains[..., 1:]], -1).flatten(1, 2)
        mixed = torch.rand(facts.shape[:2], generator=generator).argsort(-1)[..., None].expand_as(facts)
        asked = torch.stack([torch.full_like(chains[..., 0], self.THINGS), chains[..., 0]], -1).flatten(1)
        tokens = torch.cat([facts.gather(1, mixed).flatten(1), asked], 1)
        targets = torch.cat([facts.flatten(1), chains[..., -1].repeat_interleave(2, 1)], 1)
        place = torch.arange(tokens.shape[1]) - 2 * facts.shape[1]
        return classes(tokens, (place > 0) & (place % 2 == 1), targets)
