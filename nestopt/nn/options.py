"""What a layer may be made with, and its projections."""

from __future__ import annotations

import math

from torch import Tensor, nn

from nestopt.core.level import Level
from nestopt.levels.continuum.level import Cms
from nestopt.levels.deep.architectures import TitansBlock


def check_options(
    level: Level,
    dim: int,
    heads: int,
    kv_heads: int | None,
    dim_head: int | None,
    conv: int,
    rope: float | None,
    checkpoint: int,
) -> None:
    """Raise TypeError or ValueError for arguments of `SequenceMemory` that are not allowed."""
    if not isinstance(level, Level) or isinstance(level, Cms | TitansBlock):
        others = "for a cms use nestopt.nn.CMS, for a mac, mag or mal nestopt.nn.TitansMixer"
        raise TypeError(f"SequenceMemory: level={level!r} is not allowed; give a level ({others})")
    given = (("dim", dim, 1), ("heads", heads, 1), ("kv_heads", kv_heads, 1), ("dim_head", dim_head, 1))
    for name, value, least in (*given, ("conv", conv, 0), ("checkpoint", checkpoint, 0)):
        if value is not None and value < least:
            raise ValueError(f"SequenceMemory: {name}={value} is not allowed; give a whole number, {least} or more")
    if rope is not None and rope != 0 and not 1 < rope < math.inf:
        raise ValueError(f"SequenceMemory: rope={rope} is not allowed; give 0 for none, or a number above 1")
    if kv_heads is not None and heads % kv_heads:
        raise ValueError(f"SequenceMemory: kv_heads={kv_heads} is not allowed; give a divisor of heads={heads}")
    if dim_head is None and dim % heads:
        raise ValueError(f"SequenceMemory: heads={heads} does not divide dim={dim}; give dim_head, or other numbers")


def check_input(x: Tensor, dim: int) -> None:
    """Raise ValueError unless x is `[B, T, dim]` with a token or more."""
    if x.ndim != 3 or x.shape[-1] != dim:
        raise ValueError(f"SequenceMemory: x has the shape {list(x.shape)}; it must be [batch, tokens, dim={dim}]")
    if x.shape[1] == 0:
        raise ValueError(f"SequenceMemory: x has the shape {list(x.shape)}: there is no token in it; give one or more")


def projection(into: int, out: int) -> nn.Linear:
    """Weights N(0, 1/into), so that the output has the size of the input."""
    linear = nn.Linear(into, out, bias=False)
    nn.init.normal_(linear.weight, std=into**-0.5)
    return linear
