"""The parameter sets that optimizers are timed on, as lists of shapes."""

from __future__ import annotations

from collections.abc import Callable

Shape = tuple[int, ...]


def _matrices(width: int) -> list[Shape]:
    return [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]


def _gpt(width: int, layers: int, vocabulary: int, context: int) -> list[Shape]:
    """Embeddings, then per layer the matrices of attention and MLP, their biases and two norms, then the last norm."""
    vectors: list[Shape] = [(3 * width,), (width,), (4 * width,), (width,), *[(width,)] * 4]
    return [(vocabulary, width), (context, width), *(_matrices(width) + vectors) * layers, (width,), (width,)]


SETS: dict[str, tuple[str, Callable[[], list[Shape]], Callable[[], list[Shape]]]] = {
    "gpt": (
        "a GPT of 12 layers, width 384: embeddings, matrices, norms and biases",
        lambda: _gpt(384, 12, 22528, 512),
        lambda: _gpt(16, 2, 64, 8),
    ),
    "small": (
        "1,000 matrices of 64×64 with their biases",
        lambda: [(64, 64)] * 1000 + [(64,)] * 1000,
        lambda: [(8, 8)] * 10 + [(8,)] * 10,
    ),
    "gpt-matrices": ("the 48 hidden matrices of that GPT", lambda: _matrices(384) * 12, lambda: _matrices(16) * 2),
    "small-matrices": ("1,000 matrices of 64×64", lambda: [(64, 64)] * 1000, lambda: [(8, 8)] * 10),
    "two-layers": ("the 8 hidden matrices of two layers", lambda: _matrices(384) * 2, lambda: _matrices(16)),
}
"""By name: what it is, its shapes, and its shapes at toy size."""


def shapes(name: str, tiny: bool = False) -> list[Shape]:
    """The shapes of a set, with `tiny` at toy size."""
    return SETS[name][2 if tiny else 1]()
