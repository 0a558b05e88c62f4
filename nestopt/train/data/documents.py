"""Documents as a source: packed rows, read in this process or in others that run ahead."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from nestopt.train.data.dataset import DocumentSet
from nestopt.train.data.order import Order
from nestopt.train.data.packing import Packed, Place, Row, held_out
from nestopt.train.data.source import Batch, HeldOut
from nestopt.train.errors import CheckpointError, CorpusError, whole_number

Found = list[Packed] | CorpusError
"""What a worker makes of a step: its rows, or why there are none."""


class PackedDocuments:
    """A `Source` of documents that lie end to end in rows, each row with a stream of its own.

    A row's stream goes on from step to step: the last token of a window, which is a target only, is the first input of
    the next one. So every token but the first of a row is a target once, and a state may be carried on. A document that
    is longer than what is left of the window goes on in the next.

    Args:
        documents: the data.
        batch: rows in a step, over all processes.
        window: inputs in a row.
        seed: of the order.
        rank, world: this process's number and the number of processes.
        workers: processes that read and tokenize ahead of this one, each for some of its rows; 0: none, this one does
            it. Batches and states do not depend on it.

    Raises:
        CorpusError: there are no documents.
        ValueError: the batch does not divide by `world`, or there are more workers than rows of a process.
    """

    def __init__(
        self,
        documents: DocumentSet,
        *,
        batch: int,
        window: int,
        seed: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
    ) -> None:
        if batch % world:
            raise ValueError(f"batch must be a multiple of the number of processes: {batch=}, {world=}")
        if not 0 <= workers <= batch // world:
            raise ValueError(f"workers={workers} is not allowed; give 0 to {batch // world}, the rows of a process")
        if documents.blocks < 1:
            raise CorpusError(f"{documents.name}: there are no documents")
        self.documents, self.name, self.vocab = documents, documents.name, documents.vocab
        self.order = Order(seed, batch, documents.blocks, documents.shuffle)
        self.window, self.workers = window, workers
        self.rows = range(rank * batch // world, (rank + 1) * batch // world)
        self._places = {row: dataclasses.asdict(Place()) for row in self.rows}
        self._packed: Iterator[Found] | None = None

    def batch(self) -> Batch:
        tokens = torch.empty(len(self.rows), self.window + 1, dtype=torch.int64)
        starts = torch.empty(len(self.rows), self.window + 1, dtype=torch.bool)
        if self._packed is None:
            self._packed = self._begun()
        for _ in range(max(1, self.workers)):
            found = next(self._packed)
            if isinstance(found, CorpusError):
                raise found
            for packed in found:
                tokens[packed.row - self.rows[0]] = torch.from_numpy(packed.tokens)
                starts[packed.row - self.rows[0]] = torch.from_numpy(packed.starts)
                self._places[packed.row] = packed.place
        return Batch(tokens, starts)

    def held_out(self, most: int) -> HeldOut:
        return self._encoded(*held_out(self.documents, most))

    def beside(self, tested: int, most: int) -> HeldOut:
        first, size = held_out(self.documents, tested)
        texts, all_ = held_out(self.documents, size + most)
        return self._encoded(texts[len(first) :], all_ - size)

    def _encoded(self, texts: Sequence[str], size: int) -> HeldOut:
        tokens = [torch.tensor(list(self.documents.encode(text)), dtype=torch.int64) for text in texts]
        starts = [torch.arange(len(one)) == 0 for one in tokens]
        none = torch.zeros(0, dtype=torch.int64)
        return HeldOut(torch.cat([none, *tokens]), torch.cat([none.bool(), *starts]), size)

    def encode(self, text: str) -> Sequence[int]:
        return self.documents.encode_prompt(text)

    def decode(self, tokens: Sequence[int]) -> str:
        return self.documents.decode(tokens)

    def state_dict(self) -> dict[str, Any]:
        rows = {str(row): dict(place) for row, place in self._places.items()}
        return {"order": dataclasses.asdict(self.order), "rows": rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where a state is.

        Raises:
            CheckpointError: it is of other data, another batch, seed or shuffling, or it lacks a row of this process.
        """
        mine = dataclasses.asdict(self.order)
        if state.get("order") != mine:
            raise CheckpointError(
                f"the place in the data is one in the order {state.get('order')}; this run's is {mine}. Give the data, "
                "data.batch, train.seed and shuffle that the run was saved with, or begin anew with --reset-data"
            )
        missing = [row for row in self.rows if str(row) not in state["rows"]]
        if missing:
            raise CheckpointError(
                f"the place in the data lacks row {missing[0]} of the batch; give the states of all processes, merged"
            )
        self.close()
        fields = dataclasses.asdict(Place())
        places = {row: dict(state["rows"][str(row)]) for row in self.rows}
        for row, place in places.items():
            if place.keys() != fields.keys():
                raise ValueError(f"the place of row {row} has the keys {sorted(place)}")
            for key, value in place.items():
                whole_number(value, f"{key} of row {row}")
        self._places = places

    def close(self) -> None:
        self._packed = None  # which ends its workers

    def _begun(self) -> Iterator[Found]:
        rows = _Rows(self.documents, self.order, self.window + 1, self._places)
        if not self.workers:
            return iter(rows)
        # a fresh interpreter: a fork would take over the threads and locks of this one, and its accelerator
        return iter(
            DataLoader(
                rows,
                batch_size=None,
                num_workers=self.workers,
                multiprocessing_context="spawn",
                collate_fn=_as_it_is,
                generator=torch.Generator(),  # its own: a run's random numbers do not depend on workers
            )
        )


class _Rows(IterableDataset[Found]):
    """Step by step the rows at `places`; in a worker, those that are its own."""

    def __init__(
        self, documents: DocumentSet, order: Order, count: int, places: Mapping[int, Mapping[str, int]]
    ) -> None:
        self.documents, self.order, self.count = documents, order, count
        self.places = {row: Place(**place) for row, place in places.items()}

    def __iter__(self) -> Iterator[Found]:
        info = get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        rows = [Row(self.documents, self.order, row, place) for row, place in self.places.items()][first::step]
        while True:
            try:
                found = [row.take(self.count) for row in rows]
            except CorpusError as error:  # to be raised as it is, without a worker's traceback
                yield error
                return
            yield found


def _as_it_is(item: Found) -> Found:
    return item
