"""A layer from a level."""

from __future__ import annotations

from typing import Any, overload

from nestopt.core.level import Level
from nestopt.levels.continuum.level import Cms
from nestopt.levels.deep.architectures import TitansBlock
from nestopt.nn.cms import CMS
from nestopt.nn.sequence_memory import SequenceMemory
from nestopt.nn.titans import TitansMixer


@overload
def layer(level: Cms, dim: int, heads: int = 4, **options: Any) -> CMS: ...
@overload
def layer(level: TitansBlock, dim: int, heads: int = 4, **options: Any) -> TitansMixer: ...
@overload
def layer(level: Level, dim: int, heads: int = 4, **options: Any) -> SequenceMemory: ...
def layer(level: Level, dim: int, heads: int = 4, **options: Any) -> SequenceMemory | CMS | TitansMixer:
    """Return the module that runs `level` on tokens of `dim` numbers: `y, state = module(x, state=None)`, x `[B, T,
    dim]`.

    Args:
        level: a `cms` becomes a `CMS` (which has no heads), a `mac`, `mag` or `mal` a `TitansMixer`, any other level a
            `SequenceMemory`.
        dim: width of the tokens.
        heads: memories side by side.
        options: other arguments of that module.
    """
    if not isinstance(level, Level):
        raise TypeError(f"layer: {level!r} is not a level; give one, such as nestopt.levels.titans()")
    if isinstance(level, Cms):
        return CMS(dim, level, **options)
    return mixer(level, dim, heads, **options)


def mixer(level: Level, dim: int, heads: int = 4, **options: Any) -> SequenceMemory | TitansMixer:
    """Return `layer` of any level but a `cms`."""
    made = TitansMixer if isinstance(level, TitansBlock) else SequenceMemory
    return made(level, dim, heads, **options)  # type: ignore[arg-type]  # of its own kind
