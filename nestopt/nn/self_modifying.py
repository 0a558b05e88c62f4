"""Self-modifying Titans as a module."""

from __future__ import annotations

from typing import Any

from nestopt.levels.self_modifying.level import SelfModifying
from nestopt.nn.sequence_memory import SequenceMemory


class SelfModifyingTitans(SequenceMemory):
    """A `SequenceMemory` of `self_modifying` (NL eq. 83-91), whose options it takes.

    Args:
        dim: width of the tokens.
        heads: sets of memories side by side; they divide `dim`.
        level: a `self_modifying`. Default: as it comes.
        options: of `SequenceMemory`, such as `conv`.
    """

    def __init__(self, dim: int, heads: int = 4, level: SelfModifying | None = None, **options: Any) -> None:
        super().__init__(SelfModifying() if level is None else level, dim, heads, **options)
