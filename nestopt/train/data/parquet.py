"""Sharded documents, local or on the Hugging Face hub, streamed through `datasets` and read in any order."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nestopt.core.part import nearest
from nestopt.train.data.tokenizer import EXTRA, Vocabulary
from nestopt.train.errors import CorpusError

if TYPE_CHECKING:
    from datasets import IterableDataset


class Shards:
    """A `nestopt.train.data.DocumentSet` of shards.

    Its blocks are the row groups of Parquet files, each of which is read without the ones before it; of other formats,
    the files.

    Args:
        path: of a Parquet file, of a folder with such files at any depth, a pattern of files (`"/data/*.parquet"`), or
            a name on the hub (`"HuggingFaceFW/fineweb-edu"`).
        config: on the hub, which part of the dataset; None for its default.
        split: on the hub, which split.
        column: with the text.
        tokens: of the text.
        shuffle, held_out: as of a `nestopt.train.data.DocumentSet`.

    Raises:
        CorpusError: the extra is not installed, nothing is there, or it has no such column of text.
    """

    def __init__(
        self, path: str, config: str | None, split: str, column: str, tokens: Vocabulary, shuffle: int, held_out: int
    ) -> None:
        self.column, self.tokens, self.shuffle, self.held_out = column, tokens, shuffle, held_out
        self.name = path if config is None else f"{path}, {config}"
        self.vocab = tokens.vocab
        stream = _local(path, config) if is_local(path) else _on_the_hub(path, config, split)
        columns = list(stream.column_names or [])
        if column not in columns:
            raise CorpusError(
                f"{self.name} has no column {column!r}.{nearest(column, columns)} It has: {', '.join(columns)}"
            )
        kind = getattr(stream.features[column], "dtype", None)
        if kind not in ("string", "large_string"):
            raise CorpusError(f"{self.name}: the column {column!r} holds {kind or 'no text'}; give one that holds text")
        self._stream = stream.select_columns([column]).reshard()
        self.blocks: int = self._stream.num_shards

    def texts(self, block: int) -> Iterator[str]:
        # by `iter`: in a worker of a DataLoader, `datasets` would by itself leave out what it takes for another's
        for batch in self._stream.shard(num_shards=self.blocks, index=block).iter(batch_size=64):
            yield from (text or "" for text in batch[self.column])

    def encode(self, text: str) -> Sequence[int]:
        return self.tokens.encode(text)

    def encode_prompt(self, text: str) -> Sequence[int]:
        return self.tokens.encode_prompt(text)

    def decode(self, tokens: Sequence[int]) -> str:
        return self.tokens.decode(tokens)


def is_local(path: str) -> bool:
    """Return whether a path of documents is one on this machine, not a name on the hub."""
    expanded = os.path.expanduser(path)
    return os.path.exists(expanded) or os.path.isabs(expanded) or path.startswith(".") or glob.has_magic(path)


def _local(path: str, config: str | None) -> IterableDataset:
    if config is not None:
        raise CorpusError(f"config={config!r} is for datasets on the hub, and {path} is a path; give config: null")
    expanded = os.path.expanduser(path)
    if os.path.isdir(expanded):
        files = [str(file) for file in Path(expanded).rglob("*.parquet") if file.is_file()]
    else:
        files = glob.glob(expanded, recursive=True)
    if not files:
        raise CorpusError(f"no documents to train on: there is no Parquet file at {path}")
    return _streamed("parquet", path, data_files=sorted(files), split="train")


def _on_the_hub(path: str, config: str | None, split: str) -> IterableDataset:
    return _streamed(path, path, name=config, split=split)


def _streamed(builder: str, shown: str, **options: Any) -> IterableDataset:
    try:
        from datasets import load_dataset
    except ImportError:
        raise CorpusError(EXTRA) from None
    try:
        return load_dataset(builder, streaming=True, **options)
    except Exception as error:  # of the network, the hub, the file system, or a file's format: each has its own
        raise CorpusError(f"no documents to train on: {shown} can't be read: {error}") from error
