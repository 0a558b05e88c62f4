"""A description: ordered levels of memories, and the ways to show them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from nestopt.description import mermaid, svg, table
from nestopt.description.memory import WEIGHTS, Memory, in_levels
from nestopt.description.rows import Row, collapse
from nestopt.description.text import count, many, size


@dataclasses.dataclass(frozen=True)
class Description:
    """The levels of something, slowest first (NL Def. 2). `print` it, or put it last in a notebook's cell.

    Attributes:
        title: what is described.
        levels: the memories of each level; memories of one level are in no order.
        notes: what the reader should know about how it was found.
    """

    title: str
    levels: tuple[tuple[Memory, ...], ...]
    notes: tuple[str, ...] = ()

    @classmethod
    def of(cls, title: str, memories: Sequence[Memory], notes: Sequence[str] = ()) -> Description:
        """Sort `memories` into levels. Raises ValueError for a name given twice, or needs in a circle."""
        return cls(title, tuple(map(tuple, in_levels(memories))), tuple(dict.fromkeys(notes)))

    @property
    def memories(self) -> list[Memory]:
        """All memories, slowest first."""
        return [memory for level in self.levels for memory in level]

    @property
    def weights(self) -> int:
        """How many numbers the weights are."""
        return sum(memory.parameters or 0 for memory in self.memories if memory.memory == WEIGHTS)

    @property
    def weight_bytes(self) -> int:
        return sum(memory.state or 0 for memory in self.memories if memory.memory == WEIGHTS)

    @property
    def state(self) -> int:
        """Bytes of the memories of gradients whose size is known, beside the weights."""
        return sum(memory.state or 0 for memory in self._beside("gradients"))

    @property
    def sequence_state(self) -> int:
        """Bytes of the memories of tokens whose size is known, for one sequence."""
        return sum(memory.state or 0 for memory in self._beside("tokens"))

    def _beside(self, context: str) -> list[Memory]:
        return [memory for memory in self.memories if memory.context == context and memory.memory != WEIGHTS]

    def rows(self) -> list[list[Row]]:
        """Return the levels with repeated memories taken together (`"blocks.*.mixer × 12"`)."""
        return [collapse(level) for level in self.levels]

    def summary(self) -> str:
        """Return the totals in one line."""
        parts = [f"{many(len(self.memories), 'memory')} on {many(len(self.levels), 'level')}"]
        if self.weights:
            parts.append(f"{count(self.weights)} weights ({size(self.weight_bytes)})")
        for number, unknown, what in (
            (self.state, self._unknown("gradients"), "of state"),
            (self.sequence_state, self._unknown("tokens"), "per sequence"),
        ):
            if number:
                parts.append(f"{size(number)} {what}" + (f", {unknown} not counted" if unknown else ""))
        return " · ".join(parts)

    def _unknown(self, context: str) -> int:
        return sum(memory.state is None for memory in self._beside(context))

    def __str__(self) -> str:
        return table.render(self.title, self.rows(), [self.summary(), *self.notes])

    def to_data(self) -> list[dict[str, Any]]:
        """Return one plain dict per memory, slowest level first; `"level"` counts from 1."""
        return [{"level": i, **memory.to_data()} for i, level in enumerate(self.levels, 1) for memory in level]

    def to_mermaid(self) -> str:
        """Return a Mermaid flowchart, slow levels on top; an arrow leads from a memory to one that it needs first."""
        return mermaid.render(self.rows())

    def to_svg(self) -> str:
        """Return a picture that stands alone, fast levels on top, legible on light and dark pages."""
        return svg.render(self.title, self.rows(), [self.summary(), *self.notes])

    def _repr_svg_(self) -> str:
        return self.to_svg()
