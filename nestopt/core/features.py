"""Feature maps of keys and queries: the memory then associates φ(k) with v (NL eq. 51, linear attention's kernels)."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from nestopt.core.part import Part


class Features(Part):
    """A map of the last dimension of keys and queries."""

    kind: ClassVar[str] = "features"

    @property
    def positive(self) -> bool:
        """Whether φ(k)·φ(q) is never negative, as a normaliser needs it."""
        return False

    @abstractmethod
    def __call__(self, k: Tensor) -> Tensor: ...

    def dim(self, dim_k: int) -> int:
        """Return how many features a key of `dim_k` numbers has."""
        return dim_k


class Identity(Features):
    """φ(k) = k."""

    def __call__(self, k: Tensor) -> Tensor:
        return k


class Elu(Features):
    """φ(k) = elu(k) + 1, positive features (Katharopoulos et al. 2020)."""

    positive: ClassVar[bool] = True

    def __call__(self, k: Tensor) -> Tensor:
        return F.elu(k) + 1


class Polynomial(Features):
    """φ(k) = all products of `degree` entries of k, so that φ(k)·φ(q) = (k·q)^degree; dim_k^degree features."""

    degree: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("degree", 1, 4)

    @property
    def positive(self) -> bool:
        return self.degree % 2 == 0

    def __call__(self, k: Tensor) -> Tensor:
        out = k
        for _ in range(self.degree - 1):
            out = (out.unsqueeze(-1) * k.unsqueeze(-2)).flatten(-2)
        return out

    def dim(self, dim_k: int) -> int:
        return dim_k**self.degree
