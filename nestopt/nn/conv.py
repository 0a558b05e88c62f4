"""A short causal convolution over tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class CausalConv(nn.Module):
    r"""A depthwise causal convolution with a residual, $y_t = x_t + \sum_{i<\mathrm{width}} w_i \odot x_{t-i}$.

    Args:
        dim: width of the tokens.
        width: how many tokens it sees, the present one and those before it.
    """

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, dim).uniform_(-1, 1) / width**0.5)

    def init_state(self, batch: int) -> Tensor:
        """No tokens before the first: zeros `[batch, width - 1, dim]`."""
        width, dim = self.weight.shape
        return self.weight.new_zeros(batch, width - 1, dim)

    def forward(self, x: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs `[B, T, dim]` and the inputs before them `[B, width - 1, dim]`, to y and the last inputs."""
        seen = torch.cat([tail.to(x.dtype), x], dim=1)
        y = x
        for i, weight in enumerate(self.weight.flip(0)):
            y = y + weight * seen[:, i : i + x.shape[1]]
        return y, seen[:, x.shape[1] :]
