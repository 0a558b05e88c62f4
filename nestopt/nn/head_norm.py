"""The norm of what each head reads."""

from __future__ import annotations

from torch import Tensor, nn

from nestopt.kernels.unit import unit


class HeadNorm(nn.RMSNorm):
    """`torch.nn.RMSNorm` over the last dimension, which takes `eps`; its backward pass makes fewer tensors."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__(dim, eps=eps)
        self._eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return unit(x, self._eps) * self.weight
