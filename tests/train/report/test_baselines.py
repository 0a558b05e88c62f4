import argparse
import gzip
import io
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nestopt.train.report import baselines as module
from nestopt.train.report.baselines import baselines, ngram_counts, trigram_bits, unigram_bits, witten_bell

few_bytes = st.binary(max_size=60) | st.lists(st.sampled_from(b"ab\n\xff"), max_size=120).map(bytes)


def array(text: bytes) -> np.ndarray:
    return np.frombuffer(text, dtype=np.uint8)


def slow_probability(text: bytes, context: bytes, byte: int) -> float:
    """Witten-Bell by the equation, counting in the text each time."""
    shorter = slow_probability(text, context[1:], byte) if context else 1 / 256
    places = range(len(text) - len(context))
    after = [text[i + len(context)] for i in places if text[i : i + len(context)] == context]
    if not after:
        return shorter
    return (after.count(byte) + len(set(after)) * shorter) / (len(after) + len(set(after)))


@given(train=few_bytes, held_out=few_bytes.filter(len))
@settings(max_examples=15, deadline=None)
def test_trigram_equals_the_equation(train: bytes, held_out: bytes) -> None:
    bits = -sum(
        math.log2(slow_probability(train, held_out[max(0, i - 2) : i], byte)) for i, byte in enumerate(held_out)
    )
    assert trigram_bits(array(train), array(held_out)) == pytest.approx(bits / len(held_out), rel=1e-12)


@given(train=few_bytes, held_out=few_bytes.filter(len))
@settings(max_examples=30, deadline=None)
def test_unigram_equals_the_equation(train: bytes, held_out: bytes) -> None:
    counts = Counter(train)
    bits = -sum(math.log2((counts[byte] + 1) / (len(train) + 256)) for byte in held_out)
    assert unigram_bits(array(train), array(held_out)) == pytest.approx(bits / len(held_out), rel=1e-12)


@given(train=few_bytes, context=st.binary(min_size=2, max_size=2) | st.just(b"ab"))
@settings(max_examples=15, deadline=None)
def test_probabilities_sum_to_one_for_seen_and_unseen_contexts(train: bytes, context: bytes) -> None:
    tables = [ngram_counts(array(train), order) for order in (1, 2, 3)]
    grams = (context[0] * 256 + context[1]) * 256 + np.arange(256)
    probabilities = witten_bell(tables, grams)
    assert (probabilities > 0).all()
    assert probabilities.sum() == pytest.approx(1, abs=1e-12)
    assert probabilities[97] == pytest.approx(slow_probability(train, context, 97), rel=1e-12)


@given(text=st.binary(max_size=40), order=st.integers(1, 3), piece=st.integers(1, 7))
@settings(max_examples=30, deadline=None)
def test_counts_do_not_depend_on_the_pieces(text: bytes, order: int, piece: int) -> None:
    expected = Counter(text[i : i + order] for i in range(len(text) - order + 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_PIECE", piece)
        counts = ngram_counts(array(text), order)
    assert {int(n).to_bytes(order, "big"): counts[n] for n in np.flatnonzero(counts)} == expected


def test_all_three_on_text_that_repeats() -> None:
    text = array(b"the cat sat on the mat\n" * 400)
    bits = baselines(text, text[: 23 * 40])
    assert list(bits) == ["unigram", "trigram", "gzip -9"]
    assert bits["trigram"] < 0.5 * bits["unigram"]
    assert bits["gzip -9"] < 1


def test_gzip_is_a_gzip_file_at_level_9() -> None:
    text = Path(argparse.__file__).read_bytes()
    assert len(gzip.compress(text, 6)) != len(gzip.compress(text, 9))
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=buffer, mtime=0) as file:
        file.write(text)
    assert baselines(array(text), array(text))["gzip -9"] == 8 * len(buffer.getvalue()) / len(text)


def test_random_bytes_cost_at_least_their_entropy() -> None:
    draw = np.random.default_rng(0).integers(0, 256, (2, 20_000), dtype=np.uint8)
    bits = baselines(draw[0], draw[1])
    assert 7.98 < bits["unigram"] < 8.05
    assert 7.98 < bits["trigram"] < 9
    assert 8 < bits["gzip -9"] < 8.05


def test_no_held_out_text_is_an_error() -> None:
    with pytest.raises(ValueError, match="held-out"):
        baselines(array(b"abc"), array(b""))
