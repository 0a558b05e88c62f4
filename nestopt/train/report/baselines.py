"""What a language model should beat: held-out bits per byte of a unigram model, a trigram model and gzip."""

import gzip
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Counts = npt.NDArray[np.int64]

_PIECE = 1 << 24  # bytes counted at a time, which bounds the memory for the codes


def baselines(train: Bytes, held_out: Bytes) -> dict[str, float]:
    """Return bits per byte on ``held_out`` of three models that need no training worth the name.

    Args:
        train: ``[N]`` bytes to count in.
        held_out: ``[M]`` bytes to predict, M ≥ 1.

    Returns:
        ``"unigram"`` (see `unigram_bits`), ``"trigram"`` (see `trigram_bits`) and ``"gzip -9"`` (see `gzip_bits`).

    Raises:
        ValueError: if ``held_out`` is empty.
    """
    if len(held_out) == 0:
        raise ValueError("no held-out text to measure bits per byte on")
    return {
        "unigram": unigram_bits(train, held_out),
        "trigram": trigram_bits(train, held_out),
        "gzip -9": gzip_bits(held_out),
    }


def unigram_bits(train: Bytes, held_out: Bytes) -> float:
    """Return bits per byte of the byte frequencies with add-one smoothing, p(b) = (c(b) + 1) / (N + 256)."""
    bits = -np.log2((np.bincount(train, minlength=256) + 1) / (len(train) + 256))
    return float(np.bincount(held_out, minlength=256) @ bits / len(held_out))


def trigram_bits(train: Bytes, held_out: Bytes) -> float:
    """Return bits per byte of the next byte given the two before it, by `witten_bell` smoothing.

    The first byte is predicted with no context, and the second with one byte of it.
    """
    tables = [ngram_counts(train, order) for order in (1, 2, 3)]
    seen = ngram_counts(held_out, 3)
    grams = np.flatnonzero(seen)
    bits = float(-seen[grams] @ np.log2(witten_bell(tables, grams)))
    for order in (1, 2):
        if len(held_out) >= order:
            opening = _grams(held_out[:order], order)
            bits -= float(np.log2(witten_bell(tables[:order], opening)).sum())
    return bits / len(held_out)


def gzip_bits(text: Bytes) -> float:
    """Return bits per byte of ``text`` compressed by ``gzip -9``, which sees no training text."""
    return 8 * len(gzip.compress(text.tobytes(), compresslevel=9, mtime=0)) / len(text)


def ngram_counts(text: Bytes, order: int) -> Counts:
    """Return how often each run of ``order`` bytes occurs in ``text``.

    Returns:
        ``[256**order]``; the place of bytes b1 … bn is the number with these base-256 digits, b1 the highest.
    """
    counts = np.zeros(256**order, dtype=np.int64)
    for start in range(0, len(text), _PIECE):
        piece = text[start : start + _PIECE + order - 1]
        if len(piece) >= order:
            counts += np.bincount(_grams(piece, order), minlength=256**order)
    return counts


def witten_bell(tables: Sequence[Counts], grams: Counts) -> npt.NDArray[np.float64]:
    """Return the probability of each n-gram's last byte given those before it, interpolated with all shorter contexts.

    With c(h, b) the count of byte b after context h, c(h) its sum over b, T(h) the number of different bytes seen
    after h, and h' the context without its first byte::

        p(b | h) = (c(h, b) + T(h) p(b | h')) / (c(h) + T(h))

    below which lies the uniform distribution over 256 bytes. A context never seen has the probabilities of the shorter
    one. Nothing is fitted (Witten & Bell, 1991, method C).

    Args:
        tables: `ngram_counts` of the training text for orders 1, 2, … n.
        grams: ``[K]`` numbers of n-grams, n the number of tables.

    Returns:
        ``[K]`` probabilities; they sum to 1 over the 256 last bytes of a context.
    """
    probability = np.full(len(grams), 1 / 256)
    for order, counts in enumerate(tables, start=1):
        shorter = grams % 256**order
        context = shorter // 256
        rows = counts.reshape(-1, 256)
        total, kinds = rows.sum(axis=1)[context], np.count_nonzero(rows, axis=1)[context]
        mixed = (counts[shorter] + kinds * probability) / np.maximum(total + kinds, 1)
        probability = np.where(total > 0, mixed, probability)
    return probability


def _grams(text: Bytes, order: int) -> Counts:
    codes = np.zeros(len(text) - order + 1, dtype=np.int64)
    for offset in range(order):
        codes = codes * 256 + text[offset : offset + len(codes)]
    return codes
