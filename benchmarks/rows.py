"""The rows of the optimizer tables: how each candidate is built, and what its step can't do without."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import nn

from benchmarks.sets import Shape
from benchmarks.work import Work


class Stepper(Protocol):
    """What is timed of an optimizer."""

    def step(self) -> object: ...


class Missing(Exception):
    """A candidate that this installation doesn't have."""


@dataclasses.dataclass(frozen=True)
class Row:
    """Attributes:
    name: in tables, and for `--only`.
    build: from parameters that have gradients. Raises `Missing` where the candidate isn't installed or isn't there yet.
    work: for its floor.
    peer: the row that this one is to be compared with besides the table's reference.
    steps: that make one sample: as many as one period of a step that isn't always the same.
    compiled: whether it is compiled at the first steps.
    """

    name: str
    build: Callable[[list[nn.Parameter]], Stepper]
    work: Work
    peer: str = ""
    steps: int = 1
    compiled: bool = False

    @property
    def warmups(self) -> int:
        return 2 if self.compiled else 1  # the second step may compile anew, for another step count


class Parameters:
    """Parameters of a set with gradients, the same numbers for every candidate."""

    def __init__(self, shapes: Sequence[Shape]) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tensors = [nn.Parameter(0.02 * torch.randn(shape, generator=generator)) for shape in shapes]
        self._gradients = _gradients(tuple(shapes))
        self.fill()

    def fill(self) -> None:
        """Give every parameter its gradient anew: some peers write over it."""
        for param, gradient in zip(self.tensors, self._gradients, strict=True):
            if param.grad is None:
                param.grad = gradient.clone()
            else:
                param.grad.copy_(gradient)


@functools.lru_cache(maxsize=1)
def _gradients(shapes: tuple[Shape, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [0.01 * torch.randn(shape, generator=generator) for shape in shapes]


def rows(set_name: str, compiled: bool = False) -> list[Row]:
    """The rows of a set's table; with `compiled` also those that compile their step."""
    from benchmarks import nestopt_rows, peer_rows

    if set_name in ("gpt", "small"):
        found = [*peer_rows.elementwise_rows(), *nestopt_rows.elementwise_rows()]
    elif set_name in ("gpt-matrices", "small-matrices"):
        found = [*peer_rows.matrix_rows(), *nestopt_rows.matrix_rows()]
    else:
        found = [*peer_rows.second_order_rows(), *nestopt_rows.second_order_rows()]
    return [row for row in found if compiled or not row.compiled]


def reference(set_name: str, native_bfloat16: bool) -> str:
    """The row that a set's ratios are to. Emulated bfloat16 would flatter whoever is compared with it."""
    from benchmarks.peer_rows import ADAMW, MUON, MUON_FLOAT32

    if set_name.endswith("-matrices"):
        return MUON if native_bfloat16 else MUON_FLOAT32
    return ADAMW
