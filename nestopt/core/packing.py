"""Sequences that lie end to end in one row, each put into a row of its own, and back."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nestopt.core.device import by_contract, upload


@dataclasses.dataclass(frozen=True)
class Packing:
    """Where n sequences lie in a row of N tokens.

    Attributes:
        mask: `[n, longest]`, True where a sequence has a token.
        at: `[n, longest]`, its place in the row; any where it has none.
        back: `[N]`, the place of each token of the row in `mask`, flattened.
    """

    mask: Tensor
    at: Tensor
    back: Tensor

    @staticmethod
    def of(cu_seqlens: Sequence[int] | Tensor, x: Tensor, owner: str) -> Packing:
        """Find the places of sequences in x `[1, N, ..]`, each from one of these n + 1 numbers to the next.

        Args:
            cu_seqlens: rising from 0 to N. Best a list, or a tensor on the CPU: another device is waited for.
            x: the row.
            owner: who speaks in errors.

        Raises:
            ValueError: unless x is one row and `cu_seqlens` rises from 0 to N.
        """
        ends = _ends(cu_seqlens)
        if x.shape[0] != 1:
            raise ValueError(
                f"{owner}: cu_seqlens is for sequences end to end in one row; x has the shape {list(x.shape)}"
            )
        rising = all(a < b for a, b in itertools.pairwise(ends)) and all(isinstance(end, int) for end in ends)
        if len(ends) < 2 or ends[0] != 0 or ends[-1] != x.shape[1] or not rising:
            raise ValueError(
                f"{owner}: cu_seqlens={ends} is not allowed; give rising whole numbers from 0 to the {x.shape[1]} "
                "tokens of x"
            )
        longest = max(b - a for a, b in itertools.pairwise(ends))
        given = upload(ends, x.device)
        starts, lengths = given[:-1], given.diff()
        place = torch.arange(longest, device=x.device)
        mask = place < lengths[:, None]
        token = torch.arange(ends[-1], device=x.device)
        row = torch.searchsorted(given[1:], token, right=True)
        return Packing(mask, (starts[:, None] + place).clamp_max(ends[-1] - 1), row * longest + token - starts[row])

    def unpack(self, x: Tensor) -> Tensor:
        """Return `[1, N, ..]` as `[n, longest, ..]`, zeros behind each sequence."""
        seen = self.mask.reshape(*self.mask.shape, *(1,) * (x.ndim - 2))
        return torch.where(seen, x[0][self.at], 0)

    def unpack_like(self, value: Any, x: Tensor) -> Any:
        """Return `value` unpacked if it is a tensor with a number, or several, for each token of x `[1, N, H, ..]`."""
        each = isinstance(value, Tensor) and value.ndim >= 3 and value.shape[:2] == x.shape[:2]
        return self.unpack(value) if each else value

    def pack(self, y: Tensor) -> Tensor:
        """Return `[n, longest, ..]` as `[1, N, ..]`."""
        return y.flatten(0, 1)[self.back][None]


def _ends(cu_seqlens: Any) -> list[Any]:
    if isinstance(cu_seqlens, Tensor) and cu_seqlens.device.type != "cpu":
        with by_contract("documents"):
            return cu_seqlens.tolist()
    ends = cu_seqlens.tolist() if isinstance(cu_seqlens, Tensor) else [float(end) for end in cu_seqlens]
    return [int(end) if end == int(end) else end for end in ends]
