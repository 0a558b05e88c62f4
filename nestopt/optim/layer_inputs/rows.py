"""The rows that a layer's weight multiplies: tokens of a linear layer, patches of a convolution."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONV = (F.conv1d, F.conv2d, F.conv3d)
_CONV_WEIGHT = (conv1d_weight, conv2d_weight, conv3d_weight)


class Rows(Protocol):
    """The n rows of one use of a layer, in `groups` groups (1 but for grouped convolutions).

    Outputs `e` are as the layer gives them, with the batch's dimensions as `outputs` makes them.
    """

    n: int
    groups: int

    def outputs(self, y: Tensor) -> Tensor:
        """Lay out what the layer gave so that dimension 1 is that of the outputs."""

    def product(self, e: Tensor, scale: float = 1.0) -> Tensor:
        """Return scale · Σ e_i x_iᵀ `[out, in, ...]`, multiplied in the dtype of `e`."""

    def total(self, dtype: torch.dtype) -> Tensor:
        """Return Σ x_i `[groups, in, ...]`."""

    def squares(self, dtype: torch.dtype) -> Tensor:
        """Return ‖x_i‖² of each row and group, with as many dimensions as outputs, dimension 1 that of the groups."""

    def scaled(self, e: Tensor, by: Tensor) -> Tensor:
        """Return `e` times a number per row and group, laid out as `squares` gives them."""

    def matrix(self) -> Tensor:
        """Return the rows themselves, `[groups, n, in]`."""

    def read(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Return W x_i, laid out as `outputs`."""


def rows_of(module: nn.Module, x: Tensor) -> Rows:
    """Return the rows of `x` that `module` multiplies with its weight."""
    x = x.detach()
    if isinstance(module, CONVOLUTIONS):
        return ConvRows(module, x)
    return ColumnRows(x) if is_transposed(module) else LinearRows(x)


def is_transposed(module: nn.Module) -> bool:
    """Return whether `module` is transformers' `Conv1D`, a linear layer of GPT-2 whose weight is `[in, out]`."""
    theirs = sys.modules.get("transformers.pytorch_utils")  # who has one has imported it
    return theirs is not None and isinstance(module, theirs.Conv1D)


def multiplies(module: nn.Module) -> bool:
    """Return whether `module` is a layer whose weight acts on rows as torch's own linear and convolution layers do."""
    if isinstance(module, nn.Linear):
        return type(module).forward is nn.Linear.forward
    if is_transposed(module):
        return type(module).forward is sys.modules["transformers.pytorch_utils"].Conv1D.forward
    for cls in CONVOLUTIONS:
        if isinstance(module, cls):
            same = type(module).forward is cls.forward
            return same and type(module)._conv_forward is cls._conv_forward
    return False


class LinearRows:
    """Tokens: `x [..., in]`, y = W x + b."""

    groups = 1

    def __init__(self, x: Tensor) -> None:
        self.x = x.reshape(-1, x.shape[-1])
        self.n = len(self.x)

    def outputs(self, y: Tensor) -> Tensor:
        return y.reshape(self.n, y.shape[-1])

    def product(self, e: Tensor, scale: float = 1.0) -> Tensor:
        x = self.x if scale == 1.0 else self.x * scale
        return e.mT @ x.to(e.dtype)

    def total(self, dtype: torch.dtype) -> Tensor:
        return self.x.sum(0, keepdim=True, dtype=dtype)

    def squares(self, dtype: torch.dtype) -> Tensor:
        return torch.linalg.vector_norm(self.x, dim=1, keepdim=True, dtype=dtype).square()

    def scaled(self, e: Tensor, by: Tensor) -> Tensor:
        return e * by

    def matrix(self) -> Tensor:
        return self.x.unsqueeze(0)

    def read(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        return self.x.to(dtype) @ weight.to(dtype).mT


class ColumnRows(LinearRows):
    """Tokens of a layer with a weight `[in, out]`; products and totals are `[out, in]`, as those of the others."""

    def read(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        return super().read(weight.mT, dtype)


class ConvRows:
    """Patches: `x [N, C, ...]` in one to three spatial dimensions, each patch and group a row of C/groups · kernel."""

    def __init__(self, module: nn.Conv1d | nn.Conv2d | nn.Conv3d, x: Tensor) -> None:
        self.shape = module.weight.shape
        self.dims = module.weight.ndim - 2
        self.groups = module.groups
        self.stride, self.dilation = module.stride, module.dilation
        padding = module.padding
        if x.ndim == self.dims + 1:
            x = x.unsqueeze(0)
        if isinstance(padding, str) or module.padding_mode != "zeros":
            # what the layer does itself, with its own list of paddings ("same" may be lopsided)
            mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
            x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
            padding = (0,) * self.dims
        self.x, self.padding = x, padding
        spans = zip(x.shape[2:], padding, self.shape[2:], self.dilation, self.stride, strict=True)
        self.spatial = [(size + 2 * pad - far * (k - 1) - 1) // step + 1 for size, pad, k, far, step in spans]
        self.n = len(x) * torch.Size(self.spatial).numel()

    def outputs(self, y: Tensor) -> Tensor:
        return y.reshape(len(self.x), self.shape[0], *self.spatial)

    def product(self, e: Tensor, scale: float = 1.0) -> Tensor:
        x = self.x if scale == 1.0 else self.x * scale
        return self._weight(x.to(e.dtype), self.shape, e, self.groups)

    def total(self, dtype: torch.dtype) -> Tensor:
        x = self.x.sum(0, keepdim=True, dtype=dtype)
        ones = x.new_ones(1, self.groups, *self.spatial)
        return self._weight(x, (self.groups, *self.shape[1:]), ones, self.groups)

    def squares(self, dtype: torch.dtype) -> Tensor:
        # not vector_norm, which takes four times as long across channels
        pixels = self.x.unflatten(1, (self.groups, -1)).to(dtype).square().sum(2)
        ones = pixels.new_ones(self.groups, 1, *self.shape[2:])
        return self._conv(pixels, ones)

    def scaled(self, e: Tensor, by: Tensor) -> Tensor:
        return (e.unflatten(1, (self.groups, -1)) * by.unsqueeze(2)).flatten(1, 2)

    def matrix(self) -> Tensor:
        x = F.pad(self.x, [pad for size in reversed(self.padding) for pad in (size, size)])
        for dim, (k, far, step) in enumerate(zip(self.shape[2:], self.dilation, self.stride, strict=True), start=2):
            x = x.unfold(dim, far * (k - 1) + 1, step)[..., ::far]
        # [N, C, positions..., kernel...], C in groups
        x = x.unflatten(1, (self.groups, -1)).movedim(2, 2 + self.dims)
        return x.movedim(1, 0).reshape(self.groups, self.n, -1)

    def read(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        return self._conv(self.x.to(dtype), weight.to(dtype))

    def _conv(self, x: Tensor, weight: Tensor) -> Tensor:
        conv = _CONV[self.dims - 1]
        return conv(x, weight, None, self.stride, self.padding, self.dilation, self.groups)

    def _weight(self, x: Tensor, shape: Sequence[int], e: Tensor, groups: int) -> Tensor:
        weight = _CONV_WEIGHT[self.dims - 1]
        return weight(x, shape, e, self.stride, self.padding, self.dilation, groups)
