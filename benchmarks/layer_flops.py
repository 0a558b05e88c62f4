"""Floating-point operations that a layer's forward pass can't do without, from which its floor follows.

Matrix products only, a multiplication and an addition counted as two, for one token of width D = `size.dim`. Where a
layer has several forms (recurrent, by chunks) it is the one of least arithmetic, whatever a row runs.
"""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.layer_size import Size

TRAINING = 3
"""Forward and backward take at least this many forward passes: a product has two gradients, a product each."""

Flops = Callable[[Size], float]
"""Of a token."""


def projections(count: int) -> Flops:
    """So many D × D matrices applied to a token."""
    return lambda size: 2 * count * size.dim**2


def plus(*parts: Flops) -> Flops:
    return lambda size: sum(part(size) for part in parts)


def mlp(size: Size) -> float:
    """D → 4D → D."""
    return 16 * size.dim**2


def attended(size: Size, window: int | None = None) -> float:
    """Scores and weighted sum: 4D for each key that a query sees, which is T/2 on average without a window."""
    seen = size.tokens / 2
    if window is not None and window < size.tokens:
        seen = window * (1 - window / (2 * size.tokens))  # the first `window` tokens see half of it
    return 4 * seen * size.dim


def attention(size: Size) -> float:
    """Queries, keys, values and output 8D², and 2TD for the pairs."""
    return projections(4)(size) + attended(size)


def matrix_memory(delta: bool = False) -> Flops:
    """A D/H × D/H matrix a head: the write of v kᵀ and the read at q, and with `delta` the read at k."""
    return lambda size: (6 if delta else 4) * size.dim**2 / size.heads


def mlp_memory(ratio: int, heads: int | None = None, delta: bool = False) -> Flops:
    """Two matrices d → h → d a head, d = D/heads (default the size's) and h = ratio · d.

    Read at q 4dh; forward at k 4dh; the gradient through W1 2dh; both outer products into the weights 4dh. With `delta`
    also both weights, as they are by then, at their inputs, which the rank-one decay needs: 4dh from token to token, or
    by chunks of C, of whose C × C products half is needed, C(d + h) for inputs with each other and C(d + h) to solve.
    """

    def flops(size: Size) -> float:
        n = heads or size.heads
        d = size.dim / n
        h = ratio * d
        return n * (14 * d * h + delta * min(4 * d * h, 2 * size.chunk * (d + h)))

    return flops


def titans(size: Size) -> float:
    """titans-pytorch at one head, D → 4D → D: queries, keys and values 6D², and `mlp_memory` 56D²."""
    return projections(3)(size) + mlp_memory(4, heads=1)(size)


def self_modifying(size: Size) -> float:
    """nested-learning's layer, five memories with D hidden units, of which those of η and α answer with one number.

    Reads for k, v, η, α, q and of the memory 18D²; every memory at k 16D², and at v, for its target, 16D²; gradients
    and update 22D² (decay and gradient share the right factor k: one product); the triangular parts of a chunk of C
    tokens, as dense products, 30CD. Its own form multiplies by a D × D matrix at each token instead: 10D³.
    """
    return 72 * size.dim**2 + 30 * size.chunk * size.dim
