"""Memories that differ in nothing but their place in a repeated block, taken together."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence

from nestopt.description.memory import Memory

INDEX = re.compile(r"(?:(?<=\.)|^)\d+(?=\.|$)")


@dataclasses.dataclass(frozen=True)
class Row:
    """One or more memories of a level.

    Attributes:
        memory: the first of them, under the name they have in common (`"blocks.*.mixer"`), with the sizes
            and needs of all together.
        names: of every memory in the row.
    """

    memory: Memory
    names: tuple[str, ...]

    @property
    def times(self) -> str:
        return f" × {len(self.names)}" if len(self.names) > 1 else ""


def collapse(level: Sequence[Memory]) -> list[Row]:
    """Return rows of one level, in the order of their first memories."""
    alike: dict[tuple[object, ...], list[Memory]] = {}
    for memory in level:
        pattern = INDEX.sub("*", memory.name)
        key = (pattern, memory.context, memory.period, memory.memory, memory.objective, memory.rule, memory.grows)
        alike.setdefault(key, []).append(memory)
    return [_row(memories) for memories in alike.values()]


def _row(memories: list[Memory]) -> Row:
    first, names = memories[0], tuple(memory.name for memory in memories)
    if len(memories) == 1:
        return Row(first, names)
    # only the indices that vary give way to a star
    parts = zip(*(name.split(".") for name in names), strict=True)
    name = ".".join(same[0] if len(set(same)) == 1 else "*" for same in parts)
    together = dataclasses.replace(
        first,
        name=name,
        parameters=total(memory.parameters for memory in memories),
        state=total(memory.state for memory in memories),
        needs=tuple(dict.fromkeys(need for memory in memories for need in memory.needs)),
    )
    return Row(together, names)


def total(numbers: Iterable[int | None]) -> int | None:
    """Return the sum, or None if any is not known."""
    result = 0
    for number in numbers:
        if number is None:
            return None
        result += number
    return result


def edges(levels: Sequence[Sequence[Row]]) -> list[tuple[int, int]]:
    """Return which row needs which, as (needing, needed) positions in the flat list of rows. Each pair once."""
    rows = [row for level in levels for row in level]
    place = {name: i for i, row in enumerate(rows) for name in row.names}
    found = [(i, place[need]) for i, row in enumerate(rows) for need in row.memory.needs if need in place]
    return list(dict.fromkeys(found))


def direct(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return those of `pairs` that no way over other pairs implies: what a picture must show."""
    needs: dict[int, set[int]] = {}
    for needing, other in pairs:
        needs.setdefault(needing, set()).add(other)

    def reach(row: int) -> set[int]:
        found: set[int] = set()
        ahead = [row]
        while ahead:
            new = needs.get(ahead.pop(), set()) - found
            found |= new
            ahead += new
        return found

    return [(a, b) for a, b in pairs if not any(b in reach(other) for other in needs[a] - {b})]
