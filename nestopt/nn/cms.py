"""The continuum memory system as a module: MLP blocks in a chain, each on its own clock."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from nestopt.core.memories import Memory
from nestopt.core.tree import State
from nestopt.levels.cms import Cms, level_names


class Block(nn.Module):
    r"""One memory of a CMS with its weights as parameters, $x \leftarrow x + M(\mathrm{rms\_norm}(x))$.

    Attributes:
        period: optimizer steps between updates of its weights, on the sum of their gradients (NL eq. 71).
    """

    def __init__(self, memory: Memory, weights: Mapping[str, Tensor], period: int) -> None:
        super().__init__()
        self.memory, self.period = memory, period
        for name, weight in weights.items():
            self.register_parameter(name, nn.Parameter(weight))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.memory.read(dict(self.named_parameters()), F.rms_norm(x, x.shape[-1:]))

    def extra_repr(self) -> str:
        return f"{self.memory}, period={self.period}"


class CMS(nn.Module):
    r"""A static continuum memory system (NL eq. 70-71).

    Level by level, $x \leftarrow x + M^{(\ell)}(\mathrm{rms\_norm}(x))$.
    With `periods=(1,)` it is a Transformer's MLP with its norm and residual. The weights are parameters
    (`levels.every_16.W1`), and nothing changes them but the optimizer, which reads the `period` of each block.

    Args:
        dim: width of the tokens.
        level: a `cms`. Default: periods 1 and 16, two-layer MLPs with 4 · dim hidden units.

    Raises:
        ValueError: for a memory that has no weights to learn.
    """

    def __init__(self, dim: int, level: Cms | None = None) -> None:
        super().__init__()
        self.dim, self.level = dim, Cms() if level is None else level
        memory, weights = self.level.block(dim), self.level.learned_start(dim, dim)
        if not weights:
            raise ValueError(f"CMS: memory={memory!r} has no weights that a layer could learn; give mlp()")
        self.levels = nn.ModuleDict()
        for name, period in zip(level_names(self.level.periods), self.level.periods, strict=True):
            own = {key.removeprefix(f"{name}."): w for key, w in weights.items() if key.startswith(f"{name}.")}
            self.levels[name] = Block(memory, own, period * self.level.period)

    def init_state(self, batch: int) -> State:
        """The state before the first token: nothing, for the weights are parameters."""
        return {}

    def forward(self, x: Tensor, state: Mapping[str, Any] | None = None) -> tuple[Tensor, State]:
        """`[B, T, dim]` to `[B, T, dim]`, its residual included, and the state, which is empty."""
        if x.shape[-1] != self.dim:
            raise ValueError(f"CMS: x has the shape {list(x.shape)}; its last dimension must be dim={self.dim}")
        if state:
            raise ValueError(f"CMS: state has {', '.join(state)}, and a static CMS has no state; give None")
        for block in self.levels.values():
            x = block(x)
        return x, {}
