"""What a memory keeps of itself from one step to the next."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

from torch import Tensor

from nestopt.core.features import Identity
from nestopt.core.memories import Matrix
from nestopt.core.part import Channels, FieldError, Number, Part


class Retention(Part):
    """How a memory's parameters fade before each write."""

    kind: ClassVar[str] = "retention"

    @abstractmethod
    def __call__(self, theta: Tensor) -> Tensor:
        """Return what is kept of one parameter tensor of the memory."""

    def check_memory(self, level: Any) -> None:
        """Raise FieldError if the memory of `level` can't be kept so."""


class Keep(Retention):
    """Everything is kept: nothing is forgotten but by being written over."""

    def __call__(self, theta: Tensor) -> Tensor:
        return theta


class Decay(Retention):
    """A share `keep` in [0, 1] is kept each step: the α of gated memories, the β of momentum.

    Args:
        keep: a constant, or a `Gate` for a share that depends on the token; of a matrix memory also `Channels`, a share
            for each column, which is a channel of the keys.
    """

    by_channel: ClassVar[tuple[str, ...]] = ("keep",)

    keep: Number = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("keep", 0.0, 1.0)

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

    def __call__(self, theta: Tensor) -> Tensor:
        return self.keep * theta  # type: ignore[operator]  # a gate is bound to a number before it is used
