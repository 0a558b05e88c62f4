"""Documents in Parquet shards, with a tokenizer: the format of FineWeb-Edu, locally."""

from __future__ import annotations

import builtins
import itertools
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import nestopt
import nestopt.config
from nestopt.config import Config, ConfigError, build
from nestopt.train.data.builtin import Documents, FinewebEdu
from nestopt.train.data.source import merged
from nestopt.train.data.sources import documents, make
from nestopt.train.errors import CorpusError
from tests.train.data.parquet import GROUP, ROWS, SHARDS, text_of, write_shards

pytest.importorskip("datasets")
tokenizers = pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("fineweb"))


def dataset(folder: Path, **options: Any) -> FinewebEdu:
    given = {"path": str(folder), "tokenizer": str(folder / "tokenizer.json"), "config": None, "held_out": 10}
    return FinewebEdu(**{**given, "shuffle": 16, **options})


def config(folder: Path, **data: Any) -> Config:
    section = {"dataset": dataset(folder), "window": 32, "batch": 4, **data}
    return Config(model={"vocab": 512}, data=section, train={"seed": 1})


def test_every_document_is_in_the_block_of_its_row_group(folder: Path) -> None:
    found = dataset(folder).documents()
    assert found.blocks == SHARDS * ROWS // GROUP
    for block in (14, 0, 7):
        assert list(found.texts(block)) == [text_of(block * GROUP + i) for i in range(GROUP)]


@pytest.mark.parametrize("path", ["sample/100BT", "sample/*/*.parquet", "sample/100BT/001_00000.parquet"])
def test_a_path_is_a_folder_a_pattern_or_a_file(folder: Path, path: str) -> None:
    found = dataset(folder, path=str(folder / path)).documents()
    assert found.blocks == (1 if "001" in path else SHARDS) * ROWS // GROUP


def test_what_one_process_found_others_are_given(folder: Path) -> None:
    found = pickle.loads(pickle.dumps(documents(config(folder))))
    batch = make(config(folder), rank=1, world=2, given=found).batch()
    assert torch.equal(batch.tokens, make(config(folder)).batch().tokens[2:])


def test_a_document_is_marked_and_comes_back_as_text(folder: Path) -> None:
    found = dataset(folder).documents()
    tokens = found.encode(text_of(3))
    assert (tokens[0], tokens[-1]) == (0, 1)
    assert found.encode_prompt(text_of(3)) == tokens[:-1]
    assert found.decode(tokens) == text_of(3)
    assert found.vocab > max(tokens)
    plain = Documents(str(folder), str(folder), end=None).documents()
    assert plain.encode(text_of(3)) == tokens[1:-1]


def test_rows_are_documents_end_to_end(folder: Path) -> None:
    source = make(config(folder))
    read = set()
    for _ in range(100):
        tokens, starts = source.batch()
        assert starts is not None
        assert torch.equal(starts, tokens == 0)  # <s> is first in each, and nowhere else
        for row, where in zip(tokens, starts, strict=True):
            heads = where.nonzero()[:, 0].tolist()
            read |= {source.decode(row[a:b].tolist()) for a, b in itertools.pairwise(heads)}
    texts = {text_of(n) for n in range(SHARDS * ROWS)}
    held = source.held_out(10**9)
    assert held.starts is not None
    assert 0 < int(held.starts.sum()) < len(texts) // 4
    found = source.decode(held.tokens.tolist())
    assert held.bytes == len(found.encode())
    assert read < texts
    assert len(read) > len(texts) // 4
    assert not any(text in found for text in read)


@pytest.mark.parametrize("workers", [0, 1])
def test_it_goes_on_at_the_exact_sample_on_another_number_of_processes(folder: Path, workers: int) -> None:
    straight = make(config(folder))
    halves = [make(config(folder, workers=workers), rank, 2) for rank in range(2)]
    for _ in range(9):
        whole = straight.batch()
        parts = [half.batch() for half in halves]
        assert torch.equal(torch.cat([part.tokens for part in parts]), whole.tokens)
    state = json.loads(json.dumps(merged([half.state_dict() for half in halves])))
    for half in halves:
        half.close()
    assert state == straight.state_dict()
    resumed = make(config(folder, workers=workers))
    resumed.load_state_dict(state)
    for _ in range(9):
        assert torch.equal(resumed.batch().tokens, straight.batch().tokens)
    resumed.close()


def test_it_is_written_in_yaml(folder: Path) -> None:
    nestopt.config.save(config(folder), folder / "run.yaml")
    assert "dataset: fineweb_edu" in (folder / "run.yaml").read_text()
    read = nestopt.load(folder / "run.yaml")
    assert isinstance(read, Config)
    assert read.data.dataset == dataset(folder)
    assert build("dataset", "fineweb_edu") == FinewebEdu()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "/nowhere"}, "there is no Parquet file at /nowhere"),
        ({"path": "./nowhere/*.parquet"}, r"there is no Parquet file at ./nowhere/\*.parquet"),
        ({"config": "sample-100BT"}, "config='sample-100BT' is for datasets on the hub, and .* give config: null"),
        ({"column": "txt"}, "has no column 'txt'. Did you mean 'text'. It has: text, id, score"),
        ({"column": "score"}, "the column 'score' holds float64; give one that holds text"),
        ({"tokenizer": "/nowhere.json"}, "tokenizer='/nowhere.json' is neither"),
        ({"end": "<|end|>"}, r"end='<\|end\|>' is no token of .* marks: <s>, </s>"),
    ],
)
def test_refuses(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(CorpusError, match=message):
        dataset(folder, **options).documents()


def test_a_file_that_is_no_parquet_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_text("no")
    with pytest.raises(CorpusError, match="can't be read"):
        dataset(folder, path=str(tmp_path)).documents()


def test_more_tokens_than_the_model_has_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.vocab: 256 is not allowed; fineweb_edu has tokens up to"):
        make(Config(data={"dataset": dataset(folder)}))


@pytest.mark.parametrize("missing", ["datasets", "tokenizers"])
def test_without_the_extra_it_is_said_what_to_install(
    folder: Path, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == missing:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(CorpusError, match=r"pip install 'nestopt\[data\]'"):
        dataset(folder).documents()
