"""The rows of the layer tables: how each candidate is built, run and streamed, and what it can't do without."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.layer_flops import TRAINING, Flops
from benchmarks.layer_size import Size
from benchmarks.machine import Rates

MODES = "forward", "training"

Stream = Callable[[Tensor, Any], tuple[Tensor, Any]]
"""The next tokens `[B, T, D]` and the state (None at the start) to their answers and the state after them."""


@dataclasses.dataclass
class Layer:
    """A candidate at one size.

    Attributes:
        module: whose parameters are trained.
        read: the differentiable forward pass, of `inputs`.
        inputs: what gradients are taken to besides the parameters.
        infer: the forward pass that answers; default `read`. Runs under `no_grad`.
        update: what a training step does besides, under `no_grad`; default nothing.
        stream: for decoding; None if it can't go on from a state.
        jump: the state at a position, for a layer whose time there needs no walk to it: (batch, position) to state.
    """

    module: nn.Module
    read: Callable[..., Tensor]
    inputs: Sequence[Tensor]
    infer: Callable[..., Tensor] | None = None
    update: Callable[..., object] | None = None
    stream: Stream | None = None
    jump: Callable[[int, int], Any] | None = None

    def __post_init__(self) -> None:
        self._kept = {name: value.clone() for name, value in self.module.state_dict().items()} if self.update else {}
        self._cotangent: Tensor | None = None
        self.answer: Tensor | None = None

    @property
    def runs(self) -> dict[str, Callable[[], None]]:
        """By mode."""
        return dict(zip(MODES, (self.forward, self.train), strict=True))

    def call(self, mode: str) -> None:
        self.prepare()
        self.runs[mode]()

    def prepare(self) -> None:
        """Untimed, before each call: gradients are dropped, and parameters that an update changed are put back."""
        for tensor in self._wanted():
            tensor.grad = None
        if self._kept:
            self.module.load_state_dict(self._kept)

    def forward(self) -> None:
        with torch.no_grad():
            self.answer = (self.infer or self.read)(*self.inputs)

    def train(self) -> None:
        """Forward, backward to inputs and parameters, and the update pass."""
        for tensor in self.inputs:
            tensor.requires_grad_()
        answer = self.read(*self.inputs)
        if self._cotangent is None:
            self._cotangent = torch.randn(answer.shape, generator=torch.Generator().manual_seed(1))
        answer.backward(self._cotangent)
        self.answer = answer.detach()
        if self.update is not None:
            with torch.no_grad():
                self.update(*self.inputs)

    def finite(self) -> bool:
        """Whether the last call's answer and gradients are, and the parameters, which it may have updated."""
        made = [self.answer, *(tensor.grad for tensor in self._wanted()), *self.module.parameters()]
        return all(bool(tensor.isfinite().all()) for tensor in made if tensor is not None)

    def _wanted(self) -> list[Tensor]:
        return [*self.inputs, *self.module.parameters()]


@dataclasses.dataclass(frozen=True)
class Row:
    """Attributes:
    name: in tables, and for `--only`.
    build: at a size. Raises `benchmarks.rows.Missing` where it isn't installed.
    flops: of a token in the forward pass, at least.
    chunked: whether `Size.chunk` changes it; one that it doesn't is timed with the first chunk size only.
    peer: the row that this one is to be compared with besides the table's reference.
    """

    name: str
    build: Callable[[Size], Layer]
    flops: Flops
    chunked: bool = False
    peer: str = ""

    def floors_s(self, size: Size, rates: Rates) -> tuple[float, float]:
        """Seconds of the forward pass, and of forward and backward, at the measured rate of float32 products."""
        forward = size.batch * size.tokens * self.flops(size) / rates.flops_per_s["float32"]
        return forward, TRAINING * forward


def tokens(size: Size) -> Tensor:
    """The input: the same numbers for every candidate of a size."""
    return torch.randn(size.batch, size.tokens, size.dim, generator=torch.Generator().manual_seed(0))


def rows() -> list[Row]:
    """Every row, the references first."""
    from benchmarks import layer_blocks, layer_nestopt, layer_peers

    return [*layer_blocks.rows(), *layer_peers.rows(), *layer_nestopt.rows()]


def build(row: Row, size: Size) -> Layer:
    """The row's layer, its parameters from the same seed each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return row.build(size)
