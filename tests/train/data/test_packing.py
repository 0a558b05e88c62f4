"""Documents packed in rows: all of them, shuffled, and to be taken up at any sample, on any number of processes."""

from __future__ import annotations

import dataclasses
import itertools
import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nestopt.train.data.documents import PackedDocuments
from nestopt.train.data.order import Order, is_held_out, permutation
from nestopt.train.data.packing import Packed, Place, Row
from nestopt.train.data.source import Batch, Source, merged
from nestopt.train.errors import CheckpointError, CorpusError
from tests.train.data.words import END, Words


def make(documents: Words | None = None, **options: Any) -> PackedDocuments:
    return PackedDocuments(documents or Words(), **{"batch": 4, "window": 16, "seed": 3, **options})


def steps(source: Source, count: int) -> list[Batch]:
    return [source.batch() for _ in range(count)]


def same(a: list[Batch], b: list[Batch]) -> None:
    for one, other in itertools.zip_longest(a, b):
        torch.testing.assert_close(tuple(one), tuple(other), rtol=0, atol=0)


def stream(batches: list[Batch], row: int) -> tuple[list[int], list[bool]]:
    """The tokens of a row, end to end, and whether each begins a document."""
    tokens = [batch.tokens[row] for batch in batches]
    starts = [batch.starts[row] for batch in batches if batch.starts is not None]
    for before, after in itertools.pairwise(zip(tokens, starts, strict=True)):
        assert (before[0][-1], before[1][-1]) == (after[0][0], after[1][0])  # a target, and then an input
    return joined(tokens), joined(starts)


def joined(pieces: list[Tensor]) -> list[Any]:
    return torch.cat([pieces[0], *(piece[1:] for piece in pieces[1:])]).tolist()


def documents_of(tokens: list[int], starts: list[bool]) -> list[str]:
    """The whole documents in a stream, as texts."""
    heads = [i for i, start in enumerate(starts) if start]
    found = []
    for a, b in itertools.pairwise(heads):
        assert tokens[b - 1] == END
        assert END not in tokens[a : b - 1]
        found.append(" ".join(str(token) for token in tokens[a : b - 1]))
    return found


@pytest.mark.parametrize(("blocks", "batch"), [(6, 4), (40, 4), (1, 3)])
def test_an_epoch_has_every_document_once_over_all_rows(blocks: int, batch: int) -> None:
    words = Words(blocks)
    source = make(words, batch=batch)
    streams: list[list[str]] = [[] for _ in range(batch)]
    epochs = [0] * batch
    batches: list[Batch] = []
    while not all(epochs):  # every row has begun its second
        batches.append(source.batch())
        epochs = [place["epoch"] for place in source.state_dict()["rows"].values()]
    for row in range(batch):
        streams[row] = documents_of(*stream(batches, row))
    order = source.order
    for row, read in enumerate(streams):
        own = {
            text
            for piece in order.pieces(0, row)
            for text in itertools.islice(words.texts(piece.block), piece.part, None, piece.parts)
        }
        # one that is not over yet at the end of what was read is of the second epoch
        assert len(set(read[: len(own)])) == len(own)
        assert set(read[: len(own)]) == own
        assert set(read) <= words.all()
    assert set().union(*streams) == words.all()


def test_each_epoch_and_seed_has_an_order_of_its_own() -> None:
    rows = [Row(Words(40), Order(seed, 1, 40, 4), 0, Place(epoch)) for seed, epoch in [(0, 0), (0, 1), (1, 0)]]
    first, *others = [row.take(200).tokens.tolist() for row in rows]
    assert all(first != other for other in others)
    assert first == Row(Words(40), Order(0, 1, 40, 4), 0, Place()).take(200).tokens.tolist()


def test_documents_are_permuted_within_a_group_only() -> None:
    order = Order(seed=0, rows=1, blocks=40, shuffle=4)
    (piece,) = [piece for piece in order.pieces(0, 0) if piece.block == 3]
    groups = list(order.documents(0, piece, 0, map(str, range(10))))
    assert [sorted(map(int, group)) for group in groups] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert [int(text) for group in groups for text in group] != list(range(10))
    assert list(order.documents(0, piece, 1, map(str, range(10)))) == groups[1:]


@pytest.mark.parametrize("world", [2, 4])
def test_any_number_of_processes_sees_one_batch(world: int) -> None:
    whole = steps(make(), 30)
    parts = [steps(make(rank=rank, world=world), 30) for rank in range(world)]
    joined_ = [Batch(*(torch.cat(x) for x in zip(*of_step, strict=True))) for of_step in zip(*parts, strict=True)]
    same(joined_, whole)


@pytest.mark.parametrize("after", [0, 1, 7, 40])
def test_it_goes_on_at_the_exact_sample_on_any_number_of_processes(after: int) -> None:
    sources = [make(rank=rank, world=2) for rank in range(2)]
    for source in sources:
        steps(source, after)
    state = json.loads(json.dumps(merged([source.state_dict() for source in sources])))
    straight = make()
    steps(straight, after)
    rest = steps(straight, 20)
    for world in (1, 2, 4):
        resumed = [make(rank=rank, world=world) for rank in range(world)]
        for source in resumed:
            steps(source, 3)  # what it had read before is forgotten
            source.load_state_dict(state)
        parts = [steps(source, 20) for source in resumed]
        same([Batch(*(torch.cat(x) for x in zip(*of_step, strict=True))) for of_step in zip(*parts, strict=True)], rest)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 99),
    window=st.integers(1, 40),
    shuffle=st.integers(1, 12),
    blocks=st.integers(1, 9),
    after=st.integers(0, 30),
    other=st.integers(1, 40),
)
def test_a_place_is_a_token(seed: int, window: int, shuffle: int, blocks: int, after: int, other: int) -> None:
    words, order = Words(blocks, shuffle=shuffle), Order(seed, 2, blocks, shuffle)
    row = Row(words, order, 1, Place())
    place = dataclasses.asdict(Place())
    for _ in range(after):
        place = row.take(window + 1).place
    again = Row(words, order, 1, Place(**place))
    many = row.take(120)
    few: list[Packed] = [again.take(other + 1) for _ in range(-(-119 // other))]
    for whole, pieces in [(many.tokens, [p.tokens for p in few]), (many.starts, [p.starts for p in few])]:
        assert np.concatenate([pieces[0], *(piece[1:] for piece in pieces[1:])])[:120].tolist() == whole.tolist()


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers: int) -> None:
    alone, helped = make(batch=3), make(batch=3, workers=workers)
    random = torch.get_rng_state()
    same(steps(helped, 12), steps(alone, 12))
    assert torch.equal(torch.get_rng_state(), random)
    assert helped.state_dict() == alone.state_dict()  # of what was given out, though more was read
    state = alone.state_dict()
    same(steps(helped, 3), steps(alone, 3))
    helped.load_state_dict(state)
    alone.load_state_dict(state)
    same(steps(helped, 3), steps(alone, 3))
    helped.close()


def test_held_out_documents_are_never_trained_on() -> None:
    words = Words(12, held_out=5)
    held = {text for text in words.all() if is_held_out(text, 5)}
    assert 0.1 < len(held) / len(words.all()) < 0.3
    source = make(words)
    batches = steps(source, 80)
    read = {text for row in range(4) for text in documents_of(*stream(batches, row))}
    assert read == words.all() - held
    found = source.held_out(10**9)
    assert found.starts is not None
    assert set(documents_of([*found.tokens.tolist(), -1], [*found.starts.tolist(), True])) == held
    assert found.bytes == sum(len(text) for text in held)
    assert found.bytes_per_token == found.bytes / len(found.tokens)
    less = source.held_out(found.bytes // 2)
    assert less.bytes <= found.bytes // 2
    assert less.tokens.tolist() == found.tokens[: len(less.tokens)].tolist()
    assert make(words, seed=9, batch=2).held_out(300).tokens.tolist() == source.held_out(300).tokens.tolist()


def test_a_permutation_is_one_and_stays_the_one_it_is() -> None:
    assert permutation("0:0", 10).tolist() == [9, 8, 4, 6, 3, 5, 0, 2, 7, 1]
    for count in (0, 1, 1000):
        assert sorted(permutation("some", count)) == list(range(count))
    assert permutation("some", 1000).tolist() != permutation("other", 1000).tolist()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch": 4, "world": 3}, ValueError, "batch=4, world=3"),
        ({"workers": 5}, ValueError, "workers=5 is not allowed; give 0 to 4"),
        ({"workers": 3, "world": 2}, ValueError, "workers=3 is not allowed; give 0 to 2"),
        ({"documents": Words(0)}, CorpusError, "words: there are no documents"),
    ],
)
def test_refuses(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(**options)


@pytest.mark.parametrize("workers", [0, 1])
def test_fewer_documents_than_rows_are_refused(workers: int) -> None:
    with pytest.raises(
        CorpusError,
        match=r"there is no document for row \d of the 4 of the batch; give more documents, or a smaller data.batch$",
    ):
        steps(make(Words(1, per_block=3), workers=workers), 50)


def test_nothing_held_out_is_refused() -> None:
    with pytest.raises(CorpusError, match="no document is held out, with one in 1000000000; give a smaller held_out"):
        make().held_out(100)


def test_a_state_of_other_data_is_refused() -> None:
    state = make().state_dict()
    for other in (make(batch=2), make(seed=4), make(Words(7)), make(Words(shuffle=5))):
        with pytest.raises(CheckpointError, match=r"Give the data, data\.batch, train\.seed and shuffle"):
            other.load_state_dict(state)
    part = make(rank=0, world=2).state_dict()
    with pytest.raises(CheckpointError, match="lacks row 2 of the batch; give the states of all processes"):
        make().load_state_dict(part)


def test_states_of_different_runs_are_not_merged() -> None:
    with pytest.raises(ValueError, match="states is empty"):
        merged([])
    with pytest.raises(ValueError, match=r"states\[1\] is .* and states\[0\]"):
        merged([make().state_dict(), make(seed=4).state_dict()])
