"""What a memory keeps of itself from one step to the next."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from nestopt.core.features import Identity
from nestopt.core.memories import Matrix
from nestopt.core.part import Channels, FieldError, Number, Part
from nestopt.core.tree import State


class Retention(Part):
    """How a memory's parameters fade before each write."""

    kind: ClassVar[str] = "retention"

    @abstractmethod
    def __call__(self, theta: Tensor) -> Tensor:
        """Return what is kept of one parameter tensor of the memory."""

    def check_memory(self, level: Any) -> None:
        """Raise FieldError if the memory of `level` can't be kept so."""

    def begin(self, theta: Tensor) -> tuple[Tensor, State]:
        """Return a parameter tensor as the memory begins with it, and what is kept beside it: nothing, by default."""
        return theta, {}

    def write(self, theta: Tensor, step: Tensor, beside: State) -> tuple[Tensor, State]:
        """Return a parameter tensor after a write, which takes `step` off, and what is kept beside it."""
        return self(theta) - step, beside


class Keep(Retention):
    """Everything is kept: nothing is forgotten but by being written over."""

    def __call__(self, theta: Tensor) -> Tensor:
        return theta


class Share(Retention):
    """What keeps a share, and perhaps does more as a write is made."""

    keep: Number = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("keep", 0.0, 1.0)

    def __call__(self, theta: Tensor) -> Tensor:
        return self.keep * theta  # type: ignore[operator]  # a gate is bound to a number before it is used


class Decay(Share):
    """A share `keep` in [0, 1] is kept each step: the α of gated memories, the β of momentum.

    Args:
        keep: a constant, or a `Gate` for a share that depends on the token; of a matrix memory also `Channels`, a share
            for each column, which is a channel of the keys.
    """

    by_channel: ClassVar[tuple[str, ...]] = ("keep",)

    def check_memory(self, level: Any) -> None:
        if not isinstance(self.keep, Channels):
            return
        if not hasattr(level, "memory"):
            raise FieldError(
                level.label, "retention", self, "is not allowed: one share is kept of all; give a Gate for keep"
            )
        wanted = {"memory": Matrix(), "features": Identity(), "chunk": 1, "normalized": False}
        for key, value in wanted.items():
            if getattr(level, key) != value:
                wrong = f"is not allowed with {key}={getattr(level, key)!r}; give {key}={value!r}, or a Gate for keep"
                raise FieldError(level.label, "retention", self, wrong)


class ElasticNet(Share):
    r"""A share is kept, and then all entries move by `threshold` towards 0, where they end (Miras, 2504.13173).

    $$W_t = S_\gamma(\lambda W_{t-1} - \mathrm{step}), \qquad S_\gamma(z) = \mathrm{sign}(z)\max(0, |z| - \gamma)$$

    Soft forgetting by λ, hard by γ: of an l2 and an l1 penalty on the memory.

    Args:
        keep: λ in [0, 1].
        threshold: γ, 0 or more.
    """

    threshold: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("threshold", 0.0)

    def write(self, theta: Tensor, step: Tensor, beside: State) -> tuple[Tensor, State]:
        return torch.nn.functional.softshrink(self(theta) - step, self.threshold), beside


class Mirror(Share):
    """Of a memory W = mirror(A), what is kept and written is A: a write is `A ← keep · A - step`.

    A stands beside the memory in its state. A layer learns where A starts.
    """

    @abstractmethod
    def mirror(self, a: Tensor) -> Tensor:
        """Return W for A."""

    def begin(self, theta: Tensor) -> tuple[Tensor, State]:
        return self.mirror(theta), {"a": theta}

    def write(self, theta: Tensor, step: Tensor, beside: State) -> tuple[Tensor, State]:
        a = self(beside["a"]) - step
        return self.mirror(a), {"a": a}


class Lq(Mirror):
    r"""Retention by the $\ell_q$ norm, as Moneta has it (Miras, 2504.13173).

    $$A_t = \alpha A_{t-1} - \mathrm{step}, \qquad W_t = A_t / \lVert A_t\rVert_q^{q-2}$$

    of each weight as a whole. With q = 2 it is `decay`; above 3 the memory is the shorter the longer A is.

    Args:
        keep: α in [0, 1].
        q: 2 or more. Default 4.
    """

    q: float = 4.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("q", 2.0)

    def mirror(self, a: Tensor) -> Tensor:
        # no norm is 0, where it has no derivative, and A of zeros gives zeros
        total = a.abs().pow(self.q).sum() + 1e-12
        return a / total.pow((self.q - 2) / self.q)


class Kl(Mirror):
    r"""Retention by the Kullback-Leibler divergence, as Memora has it (Miras, 2504.13173).

    $$W_t = c\,\mathrm{softmax}(\alpha\log W_{t-1} - \mathrm{step})$$

    of each row, which so has positive entries whose sum is c. What is kept beside is A = log W, but for a constant of
    each row; it starts at √n times what a weight of n inputs would start at, so that rows are not all alike.

    Args:
        keep: α in [0, 1].
        scale: c, above 0. Default 1.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("scale", 0.0, closed="()")

    def begin(self, theta: Tensor) -> tuple[Tensor, State]:
        return super().begin(theta * math.sqrt(theta.shape[-1] if theta.ndim else 1))

    def mirror(self, a: Tensor) -> Tensor:
        return self.scale * (a if a.ndim else a[None]).softmax(-1).view_as(a)
