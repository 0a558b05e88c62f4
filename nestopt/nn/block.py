"""A memory as one step of a residual stream."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from nestopt.core.level import Level
from nestopt.nn.sequence_memory import SequenceMemory


class MemoryBlock(nn.Module):
    r"""$x + \mathrm{memory}(\mathrm{norm}(x))$: a pre-norm residual block from x to x, as `nn.Sequential` wants them.

    Every call begins new sequences. To go on with a state, call its `memory`, a `SequenceMemory`.

    Args:
        level: any level but `cms`.
        dim: width of the tokens.
        heads: memories side by side.
        options: other arguments of `SequenceMemory`.

    >>> import torch
    >>> from nestopt.levels import deltanet, titans
    >>> model = torch.nn.Sequential(MemoryBlock(titans(), 8, 2), MemoryBlock(deltanet(), 8, 2), torch.nn.Linear(8, 3))
    >>> list(model(torch.randn(2, 5, 8)).shape)
    [2, 5, 3]
    """

    def __init__(self, level: Level, dim: int, heads: int = 4, **options: Any) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(dim)
        self.memory = SequenceMemory(level, dim, heads, **options)

    def forward(self, x: Tensor) -> Tensor:
        """Run tokens `[B, T, dim]`, T >= 1, through the block."""
        return x + self.memory(self.norm(x))[0]
