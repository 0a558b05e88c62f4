"""Batches of sequences of different lengths: each row's tokens moved to its front, and back."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import torch
from torch import Tensor

from nestopt.ops.padding import places


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
        """`[B, T, D]` with each row's tokens at its front, and zeros behind them."""
        x = torch.where(self.mask[..., None], x, 0)
        return torch.zeros_like(x).scatter(1, self.place[..., None].expand_as(x), x)

    def back(self, y: Tensor) -> Tensor:
        """`[B, T, D]` with each token where it was, and zeros at padding."""
        return torch.where(self.mask[..., None], y.gather(1, self.place[..., None].expand_as(y)), 0)


def lengths_of(cu_seqlens: Any, x: Tensor, owner: str) -> Tensor:
    """The mask `[n, longest]` of sequences that lie end to end in x `[1, N, D]`.

    Raises:
        ValueError: unless x is one row and `cu_seqlens` rises from 0 to N.
    """
    ends = [int(end) for end in cu_seqlens]
    if x.shape[0] != 1:
        raise ValueError(f"{owner}: cu_seqlens is for sequences end to end in one row; x has the shape {list(x.shape)}")
    rising = all(a < b for a, b in itertools.pairwise(ends))
    if len(ends) < 2 or ends[0] != 0 or ends[-1] != x.shape[1] or not rising:
        raise ValueError(
            f"{owner}: cu_seqlens={ends} is not allowed; give rising numbers from 0 to the {x.shape[1]} tokens of x"
        )
    lengths = torch.tensor(ends, device=x.device).diff()
    return torch.arange(max(b - a for a, b in itertools.pairwise(ends)), device=x.device) < lengths[:, None]


def spread(x: Tensor, mask: Tensor) -> Tensor:
    """`[1, N, D]` as `[n, longest, D]`, the tokens of each sequence in its row, zeros behind them."""
    return x.new_zeros(*mask.shape, x.shape[-1]).masked_scatter(mask[..., None], x[0])
