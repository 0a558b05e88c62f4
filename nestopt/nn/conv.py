"""A short causal convolution over tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nestopt.kernels.causal_conv import causal_conv


class CausalConv(nn.Conv1d):
    r"""A depthwise causal convolution with a residual, $y_t = x_t + \sum_{i<\mathrm{width}} w_i \odot x_{t-i}$.

    Args:
        dim: width of the tokens.
        width: how many tokens it sees, the present one and those before it.
    """

    def __init__(self, dim: int, width: int) -> None:
        super().__init__(dim, dim, width, groups=dim, bias=False)

    def init_state(self, batch: int) -> Tensor:
        """No tokens before the first: zeros `[batch, width - 1, dim]`, float32 at least."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        return self.weight.new_zeros(batch, self.kernel_size[0] - 1, self.in_channels, dtype=dtype)

    def forward(  # type: ignore[override]
        self, x: Tensor, tail: Tensor, count: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Inputs `[B, T, dim]` and the inputs before them `[B, width - 1, dim]`, to y and the last inputs.

        With `count` `[B]`, row b has so many tokens, and what comes after them is padding.
        """
        seen, width = torch.cat([tail.to(x.dtype), x], dim=1), self.kernel_size[0]
        if x.shape[1] == 1:
            y = x + (seen * self.weight[:, 0].mT).sum(1, keepdim=True)
        else:
            y = causal_conv(seen, self.weight[:, 0].mT)
        if count is None:
            return y, seen[:, x.shape[1] :].to(tail.dtype)
        last = count[:, None] + torch.arange(width - 1, device=x.device)
        return y, seen.gather(1, last[..., None].expand(-1, -1, x.shape[-1])).to(tail.dtype)
