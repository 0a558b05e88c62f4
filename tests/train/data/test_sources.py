"""From a configuration to its data: what the loop has drawn so far, and what is refused."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nestopt.config import Config, ConfigError
from nestopt.train.data import DocumentDataset, DocumentSet
from nestopt.train.data.source import merged
from nestopt.train.data.sources import documents, make
from nestopt.train.data.text import from_path, held_out_text, windows
from nestopt.train.errors import CorpusError
from tests.train.data.words import Words


class Made(DocumentDataset):
    """Documents that a plugin would bring."""

    def documents(self) -> DocumentSet:
        return Words(vocab=300)  # which is not so: that it is believed is what is tested


def config(path: Path | None = None, **data: Any) -> Config:
    given = {"path": str(path)} if path else {"dataset": Made()}
    return Config(data={**given, "window": 9, "batch": 4, **data}, train={"seed": 7}, model={"vocab": 300})


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text").write_bytes(np.random.default_rng(0).bytes(5000))
    return tmp_path / "text"


def test_bytes_are_the_windows_that_they_were(text: Path) -> None:
    corpus = from_path(text)
    tokens = torch.from_numpy(corpus.train)
    for world in (1, 2):
        for rank in range(world):
            source = make(config(text), rank, world)
            for step in range(3):
                batch = source.batch()
                assert batch.starts is None
                true = windows(tokens, step, batch=4, length=9, seed=7, rank=rank, world=world)
                assert torch.equal(batch.tokens, true)
            state = source.state_dict()
            again = make(config(text), rank, world)
            again.load_state_dict(merged([state, state]))
            assert torch.equal(again.batch().tokens, source.batch().tokens)
    held = source.held_out(100)
    assert held.tokens.tolist() == held_out_text(corpus.held_out, 100).tolist()
    assert (held.starts, held.bytes, held.bytes_per_token) == (None, 100, 1.0)
    assert source.decode(source.encode("def Ω")) == "def Ω"


def test_documents_of_a_plugin_are_packed() -> None:
    batch = make(config(), rank=1, world=2).batch()
    assert batch.tokens.shape == (2, 10)
    assert batch.starts is not None
    assert batch.starts[:, 0].all()
    assert batch.targets == 18 - int(batch.starts[:, 1:].sum()) < 18
    found = pickle.loads(pickle.dumps(documents(config())))
    assert torch.equal(make(config(), rank=1, world=2, given=found).batch().tokens, batch.tokens)


def test_text_as_bytes_has_no_documents(text: Path) -> None:
    assert documents(config(text)) is None
    assert make(config(text)).batch().targets == 4 * 9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": {"dataset": None}}, "data.dataset: null is not allowed; give a dataset, or data.path"),
        ({"data": {"workers": 1}}, "data.workers: 1 is not allowed; it is for documents"),
        ({"model": {"vocab": 255}}, "model.vocab: 255 is not allowed; bytes need 256 or more"),
        ({"data": {"dataset": Made(), "workers": 9}}, "data.workers: 9 is not allowed; give at most 8"),
        ({"data": {"dataset": Made()}}, "model.vocab: 256 is not allowed; made has tokens up to 299: give 300 or more"),
    ],
)
def test_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(Config(**change))


def test_a_batch_that_processes_can_not_share_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.batch: 4 is not allowed; give a multiple of 3"):
        make(config(), world=3)


def test_documents_are_no_text_in_one_piece() -> None:
    with pytest.raises(CorpusError, match="made is a dataset of documents and tokens"):
        Made().load()
