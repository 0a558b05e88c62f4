"""A long sequence in pieces, each through the whole layer before the next.

What a layer makes of a token, some dozen vectors, then stays in a CPU's cache and in memory that was used before: that
of large tensors is asked for anew each time, which takes longer than to fill it. Nothing else depends on the pieces.
"""

from __future__ import annotations

import math

from torch import Tensor

from nestopt.core.token_form import TokenForm
from nestopt.core.tree import State
from nestopt.levels.matrix.segments import CACHED


def lengths(form: TokenForm, x: Tensor, memory: State) -> list[int]:
    """Return the lengths of pieces of x `[B, T, dim]`, after the pending tokens of `memory`: what stays in a cache.

    All of x on other devices than a CPU, and for forms that take no pieces.
    """
    batch, length, dim = x.shape
    if x.device.type != "cpu" or not form.piece:
        return [length]
    least = math.lcm(form.piece, form.chunk)
    most = max(CACHED // (batch * dim * least), 1) * least
    first = min(most - form.pending(memory), length)
    rest = length - first
    return [first, *[most] * (rest // most), *([rest % most] if rest % most else [])]
