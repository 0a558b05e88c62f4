"""Titans beside attention: what stands in a model in the place of one mixer, and is made of two (MAC, MAG, MAL)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import Tensor

from nestopt.core.level import Level
from nestopt.core.order import Node
from nestopt.core.part import FieldError
from nestopt.core.signal import Signal
from nestopt.core.tree import State
from nestopt.levels.deep.level import Titans


class TitansBlock(Level):
    """A long-term memory and attention with persistent tokens, put together in one of three ways.

    A layer of its own runs it, `nestopt.nn.TitansMixer`; on gradients it is its memory alone.

    Args:
        memory: the long-term memory: any level that writes. Default `titans`.
        size: tokens that attention sees at most: a window, or a segment. Default 64.
        persistent: learned tokens that stand before all others, for attention. Default 4.

    Raises:
        FieldError: for a number below 1, or a memory that keeps every pair.
    """

    memory: Level = dataclasses.field(default_factory=Titans)
    size: int = 64
    persistent: int = 4

    way: ClassVar[str] = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("size", 1)
        self.check("persistent", 1)
        if self.memory.appends or isinstance(self.memory, TitansBlock):
            problem = "is not allowed: it is no long-term memory that is written; give one such as titans"
            raise FieldError(self.label, "memory", self.memory, problem)

    # -- on gradients --------------------------------------------------------------------------------------------------

    def init(self, param: Tensor) -> State:
        return {"memory": self.memory.init(param)}

    def step(self, grad: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        direction, memory = self.memory.step(grad, state["memory"], signal)
        return direction, {"memory": memory}

    # -- on tokens -----------------------------------------------------------------------------------------------------

    def init_tokens(self, dim_k: int, dim_v: int, like: Tensor, learned: State) -> State:
        return {"memory": self.memory.init_tokens(dim_k, dim_v, like, learned)}

    def token_step(self, q: Tensor, k: Tensor, v: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        raise ValueError(f"{self.label} is run on tokens by a layer of its own, nestopt.nn.TitansMixer(level, dim)")

    def nodes(self, name: str, period: int = 1, after: tuple[str, ...] = ()) -> list[Node]:
        return self.memory.nodes(f"{name}.memory", period * self.period, after)


class Mac(TitansBlock):
    r"""Memory as context (Behrouz et al. 2501.00663, sec. 4.1): attention within a segment, and to what is remembered.

    Of a segment S of `size` tokens, with M the memory as the segment found it, $M_t$ after token t, and persistent
    tokens p:

    $$h = M(S W_Q), \qquad y = \mathrm{Attn}(p \,\Vert\, h \,\Vert\, S), \qquad M_t = M_{t-1}(y_t), \qquad
      o_t = y_t \otimes M_t(y_t)$$

    Token t attends to p, and to the h and S of itself and of those before it in its segment.
    """

    way: ClassVar[str] = "mac"


class Mag(TitansBlock):
    r"""Memory as a gate (Behrouz et al. 2501.00663, sec. 4.2): attention in a window, times what is remembered.

    $$y = \mathrm{SWA}^*(p \,\Vert\, x), \qquad o = y \otimes M(x)$$

    The persistent tokens p are seen by all, beside a window of the last `size` tokens.
    """

    way: ClassVar[str] = "mag"


class Mal(TitansBlock):
    r"""Memory as a layer (Behrouz et al. 2501.00663, sec. 4.3): attention in a window, to what the memory makes.

    $$y = M(x), \qquad o = \mathrm{SWA}(p \,\Vert\, y)$$
    """

    way: ClassVar[str] = "mal"
