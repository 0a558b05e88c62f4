"""One memory of a continuum at its present weights: its read, and the gradient of what it read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, cast

from torch import Tensor
from torch.func import vjp, vmap

from nestopt.core.memories import Memory, Mlp, Theta
from nestopt.core.precision import matmul
from nestopt.levels.deep import mlp


class Linearization(Protocol):
    """A memory, one copy per sequence, as seen from keys `[B, n, D]`.

    Attributes:
        y: the read `[B, n, D]`.
    """

    y: Tensor

    def gradient(self, error: Tensor) -> Theta:
        """By each weight, `[B, ...]`: of the sum over tokens of `error` `[B, n, D]` times the read."""

    def pull(self, error: Tensor) -> Tensor:
        """By the keys, `[B, n, D]`."""

    def energy(self) -> Tensor:
        r"""Of each token `[B, n]`: a bound of $\lVert\partial y/\partial\theta\rVert^2$.

        Over the memory's weights, $\sum_l |a_l|^2 j_l^2$ of their inputs a and sensitivities j: the diagonal of K in
        `nestopt.levels.deep.step_size`.
        """


def read(memory: Memory, theta: Theta, k: Tensor) -> Tensor:
    """M(k) of each sequence: θ `[B, ...]` or `[1, ...]`, k `[B, n, D]`."""
    theta, rows = _rows(theta)
    if (isinstance(memory, Mlp) and memory.by_hand) or not rows:
        return memory.read(theta, k)
    return vmap(memory.read, in_dims=(_dims(theta, rows), 0))(theta, k)


def each_row(function: Callable[[Theta, Tensor], Theta], theta: Theta, k: Tensor) -> Theta:
    """Return what `function` makes of the weights and keys `[n, D]` of each sequence, `[B, ...]` by name."""
    theta, rows = _rows(theta)
    found: Theta = vmap(function, in_dims=(_dims(theta, rows), 0))(theta, k)
    return found


def linearize(memory: Memory, theta: Theta, k: Tensor) -> Linearization:
    """Do as `read`, with what it takes to learn from it: in closed form for an `Mlp`, else by `torch.func`."""
    theta, rows = _rows(theta)
    return _Closed(memory, theta, k) if isinstance(memory, Mlp) and memory.by_hand else _Any(memory, theta, rows, k)


def is_shared(weight: Tensor) -> bool:
    """Return whether all sequences of `weight` `[B, ...]` have one and the same in memory."""
    return weight.shape[0] == 1 or weight.stride(0) == 0


def _rows(theta: Theta) -> tuple[Theta, set[str]]:
    """θ with weights that are the same for all sequences taken once, and the names of the others.

    One product with a shared weight is sooner done than one per sequence, and it is a static layer's to the bit. What
    comes back to such a weight as a gradient is the sum over sequences.
    """
    rows = {name for name, weight in theta.items() if not is_shared(weight)}
    return {name: weight if name in rows else weight[0] for name, weight in theta.items()}, rows


def _dims(theta: Theta, rows: set[str]) -> dict[str, int | None]:
    return {name: 0 if name in rows else None for name in theta}


class _Weight:
    """What `nestopt.levels.deep.mlp` asks of a weight, of one that is not written meanwhile."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def apply(self, x: Tensor) -> Tensor:
        return matmul(x, self.weight.mT)

    def pull(self, d: Tensor) -> Tensor:
        return matmul(d, self.weight)

    def lengths(self) -> Tensor:
        return self.weight.square().sum(-2)


class _Closed:
    def __init__(self, memory: Mlp, theta: Theta, k: Tensor) -> None:
        self.form = mlp.Form(memory.activation, memory.residual, memory.norm)
        self.names = [f"W{i}" for i in range(1, memory.depth + 1)]
        self.weights = cast(mlp.Weights, [_Weight(theta[name]) for name in self.names])
        self.at = mlp.linearise(self.weights, k, self.form)
        self.y = self.at.y
        self._errors: tuple[Tensor, list[Tensor]] | None = None

    def gradient(self, error: Tensor) -> Theta:
        found = zip(self.names, self._backward(error), self.at.inputs, strict=True)
        return {name: matmul(d.mT, a) for name, d, a in found}

    def pull(self, error: Tensor) -> Tensor:
        dk = self.weights[-1].pull(self._backward(error)[-1])
        return dk + error if self.form.residual else dk

    def energy(self) -> Tensor:
        total = None
        bounds = mlp.sensitivities(self.weights, self.at, self.form)
        for a, j in zip(self.at.inputs, bounds, strict=True):
            size = a.square().sum(-1)
            size = size if j is None else size * j.square()
            total = size if total is None else total + size
        assert total is not None
        return total

    def _backward(self, error: Tensor) -> list[Tensor]:
        if self._errors is None or self._errors[0] is not error:
            self._errors = error, mlp.errors(self.weights, self.at, error, self.form)
        return self._errors[1]


class _Any:
    """Any memory made of weights, by differentiating its read."""

    def __init__(self, memory: Memory, theta: Theta, rows: set[str], k: Tensor) -> None:
        self.memory, self.theta, self.k = memory, theta, k
        self.dims = _dims(theta, rows)
        self.y = vmap(memory.read, in_dims=(self.dims, 0))(theta, k)
        self._found: tuple[Tensor, tuple[Theta, Tensor]] | None = None

    def gradient(self, error: Tensor) -> Theta:
        return self._backward(error)[0]

    def pull(self, error: Tensor) -> Tensor:
        return self._backward(error)[1]

    def energy(self) -> Tensor:
        def one(theta: Theta, k: Tensor) -> Tensor:
            layers = self.memory.layers(theta, k)
            assert layers is not None  # a CMS has asked
            return cast(Tensor, sum(a.square().sum(-1) * j.square() for a, j in layers.values()))

        return vmap(one, in_dims=(self.dims, 0))(self.theta, self.k)

    def _backward(self, error: Tensor) -> tuple[Theta, Tensor]:
        def one(theta: Theta, k: Tensor, error: Tensor) -> Any:
            return vjp(self.memory.read, theta, k)[1](error)

        if self._found is None or self._found[0] is not error:
            self._found = error, vmap(one, in_dims=(self.dims, 0, 0))(self.theta, self.k, error)
        return self._found[1]
