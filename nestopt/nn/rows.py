"""Batches of sequences of different lengths: each row's tokens moved to its front, and back."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from nestopt.core.padding import places


@dataclasses.dataclass(frozen=True)
class Rows:
    """Where the tokens of a batch stand once all padding is behind them.

    Whatever lay between them, a row's tokens are then neighbours, as they are alone: convolutions, positions and chunks
    see no padding.

    Attributes:
        mask: `[B, T]` as it was given, True for tokens.
        place: `[B, T]`, to which place each token or padding goes.
    """

    mask: Tensor
    place: Tensor

    @staticmethod
    def of(mask: Tensor) -> Rows:
        return Rows(mask, places(~mask))

    @property
    def count(self) -> Tensor:
        """`[B]`: how many tokens each row has."""
        return self.mask.sum(-1)

    @property
    def front(self) -> Tensor:
        """`[B, T]`: the mask of the moved tokens."""
        return torch.arange(self.mask.shape[1], device=self.mask.device) < self.count[:, None]

    def moved(self, x: Tensor) -> Tensor:
        """Return `[B, T, D]` with each row's tokens at its front, and zeros behind them."""
        x = torch.where(self.mask[..., None], x, 0)
        return torch.zeros_like(x).scatter(1, self.place[..., None].expand_as(x), x)

    def back(self, y: Tensor) -> Tensor:
        """Return `[B, T, D]` with each token where it was, and zeros at padding."""
        return torch.where(self.mask[..., None], y.gather(1, self.place[..., None].expand_as(y)), 0)
