"""Feature maps of keys and queries: the memory then associates φ(k) with v (NL eq. 51, linear attention's kernels)."""

from __future__ import annotations

import functools
import math
import random
from abc import abstractmethod
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from nestopt.core.device import constants
from nestopt.core.part import Part
from nestopt.core.precision import matmul


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


class Random(Features):
    r"""`count` random features whose products are, in the mean, a kernel of keys (Rahimi and Recht 2007).

    $$\mathrm{fourier}:\ \phi_i(k) = \sqrt{2/m}\,\cos(\omega_i\cdot k + b_i), \qquad
      \mathrm{positive}:\ \phi_i(k) = \exp(\omega_i\cdot k - \tfrac12\lVert k\rVert^2)/\sqrt m$$

    with ω of normal numbers: of the Gaussian kernel $e^{-\lVert k - q\rVert^2/2}$, and of softmax's $e^{k\cdot q}$
    (Choromanski et al. 2021). Their number does not grow with the keys', as that of products does. They are drawn from
    `seed` and nothing else: the same in every process and run, and no part of a state.

    Args:
        count: m, 1 or more. Default 64.
        of: `"fourier"` (default) or `"positive"`.
        seed: a whole number, 0 or more.
    """

    count: int = 64
    of: Literal["fourier", "positive"] = "fourier"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("count", 1)
        self.check("seed", 0)
        self.check_choice("of", ("fourier", "positive"))

    def __call__(self, k: Tensor) -> Tensor:
        drawn = constants(_drawn(self.count, k.shape[-1], self.seed), k).view(self.count, -1)
        z = matmul(k, drawn[:, :-1].mT)
        if self.of == "fourier":
            return (z + 2 * math.pi * drawn[:, -1]).cos() * math.sqrt(2 / self.count)
        return (z - 0.5 * k.square().sum(-1, keepdim=True)).exp() / math.sqrt(self.count)

    def dim(self, dim_k: int) -> int:
        return self.count


@functools.cache
def _drawn(count: int, dim: int, seed: int) -> tuple[float, ...]:
    """Return `count` rows, one after the other, of `dim` normal numbers and one more in [0, 1)."""
    source = random.Random(seed)
    return tuple(x for _ in range(count) for x in (*(source.gauss(0, 1) for _ in range(dim)), source.random()))
