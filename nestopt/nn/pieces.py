"""A long sequence in pieces, each through the whole layer before the next.

What a layer makes of a token, some dozen vectors, then stays in a CPU's cache and in memory that was used before: that
of large tensors is asked for anew each time, which takes longer than to fill it. Nothing else depends on the pieces.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nestopt.core.level import Level
from nestopt.core.token_reference import PENDING
from nestopt.levels.matrix.segments import CACHED
from nestopt.ops.dispatch import fast_form

BLOCK = 64
"""Tokens that closed forms take together, at most: a piece is so many of them, and of the level's chunks."""


def lengths(level: Level, x: Tensor, memory: Mapping[str, Any]) -> list[int]:
    """Of the pieces of x `[B, T, dim]`, after the pending tokens of `memory`: as many chunks as stay in a cache.

    All of x on other devices than a CPU, and for levels without a closed form, or whose memory grows.
    """
    batch, length, dim = x.shape
    if x.device.type != "cpu" or fast_form(level) is None or _grows(level):
        return [length]
    least = math.lcm(BLOCK, level.span)
    most = max(CACHED // (batch * dim * least), 1) * least
    done = memory[PENDING]["live"].shape[2] if PENDING in memory and not level.keeps_pending else 0
    first = min(most - done, length)
    rest = length - first
    return [first, *[most] * (rest // most), *([rest % most] if rest % most else [])]


def _grows(level: Level) -> bool:
    return fast_form(level) == "attention" and level.memory.size is None  # type: ignore[attr-defined]
