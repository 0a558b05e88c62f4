"""What a step can't do without: bytes moved and floating-point operations, from which its floor follows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from benchmarks.machine import Rates
from benchmarks.sets import Shape

FLOAT = 4  # bytes


@dataclasses.dataclass(frozen=True)
class Work:
    """Attributes:
    bytes: moved for one tensor of a shape.
    flops: of its matrix products.
    dtype: of those products.
    """

    bytes: Callable[[Shape], float]
    flops: Callable[[Shape], float] = lambda shape: 0.0
    dtype: str = "float32"

    def floors_s(self, shapes: Sequence[Shape], rates: Rates) -> tuple[float, float]:
        """Seconds that the bytes take at the best bandwidth, and the products at the best rate of their dtype."""
        moved = sum(self.bytes(shape) for shape in shapes) / rates.bytes_per_s
        return moved, sum(self.flops(shape) for shape in shapes) / rates.flops_per_s[self.dtype]


def passes(read: int, write: int) -> Callable[[Shape], float]:
    """Bytes of so many float32 tensors of the parameter's shape read and written once."""
    return lambda shape: FLOAT * (read + write) * math.prod(shape)


def elementwise(states: int) -> Work:
    """Reads parameter, gradient and state, writes parameter and state, each once."""
    return Work(passes(2 + states, 1 + states))


def quintic(steps: int) -> Callable[[Shape], float]:
    """Newton-Schulz by a polynomial of degree five, in the form that takes least for the shape.

    Neither count uses that Gram matrices are symmetric, which would save up to half of some products.
    """

    def flops(shape: Shape) -> float:
        m, n = sorted(shape)
        standard = steps * (4 * m * m * n + 2 * m**3)
        # On G = XXᵀ alone: G², then P = aI + bG + cG², Q ← PQ, G ← PGP; X enters in XXᵀ and in QX only. The first
        # Q is P itself and the last G is not needed.
        gram = 4 * m * m * n + (8 * steps - 6) * m**3
        return min(standard, gram)

    return flops


def cubic(steps: int) -> Callable[[Shape], float]:
    """As `quintic`, by a polynomial of degree three: P = aI + bG."""

    def flops(shape: Shape) -> float:
        m, n = sorted(shape)
        return min(steps * 4 * m * m * n, 4 * m * m * n + 6 * (steps - 1) * m**3)

    return flops


def shampoo() -> Work:
    """Both Gram matrices and both products with their roots; the roots themselves are not counted."""
    return Work(
        bytes=lambda shape: FLOAT * (3 * math.prod(shape) + 3 * sum(side * side for side in shape)),
        flops=lambda shape: 4 * math.prod(shape) * sum(shape),
    )
