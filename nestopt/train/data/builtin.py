"""The built-in datasets, registered by the hook that plugins use."""

from __future__ import annotations

from nestopt.core.hookspecs import Register, hookimpl
from nestopt.train.data.dataset import Dataset, DocumentDataset
from nestopt.train.data.parquet import Shards
from nestopt.train.data.text import Corpus, from_path, standard_library
from nestopt.train.data.tokenizer import Vocabulary


class Stdlib(Dataset):
    """The source text of the Python standard library: on every machine, split by file."""

    def load(self) -> Corpus:
        return standard_library()


class Files(Dataset):
    """A file, or all text files in a folder.

    Args:
        path: of the file or folder.
    """

    path: str

    def load(self) -> Corpus:
        return from_path(self.path)


class Documents(DocumentDataset):
    """Documents in Parquet shards, local or on the Hugging Face hub, with a tokenizer. Needs the extra `data`.

    Args:
        path: of a Parquet file, of a folder with such files, a pattern of files, or a name on the hub.
        tokenizer: the path of a `tokenizer.json`, or of a folder with one; or a name on the hub.
        config: on the hub, which part of the dataset.
        split: on the hub, which split.
        column: with the text.
        begin: the token before each document; null for none.
        end: the token behind each document; null for none.
        shuffle: documents of a row group that are permuted together, in memory.
        held_out: one document in so many is held out, by a hash of its text.
    """

    path: str
    tokenizer: str
    config: str | None = None
    split: str = "train"
    column: str = "text"
    begin: str | None = None
    end: str | None = "</s>"
    shuffle: int = 1024
    held_out: int = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("shuffle", 1)
        self.check("held_out", 2)

    def documents(self) -> Shards:
        return Shards(self.path, self.config, self.split, self.column, self.tokens(), self.shuffle, self.held_out)

    def tokens(self) -> Vocabulary:
        return Vocabulary(self.tokenizer, self.begin, self.end)


class FinewebEdu(Documents):
    """FineWeb-Edu, streamed from the hub: 100 billion tokens of educational web pages, with a Llama tokenizer of 32,000
    tokens. For a copy of one's own give its `path`, and `config: null`.

    Args:
        config: `sample-10BT`, `sample-100BT`, `sample-350BT`, or `default` for all of it.
    """

    path: str = "HuggingFaceFW/fineweb-edu"
    tokenizer: str = "TinyLlama/TinyLlama-1.1B-Chat-v1.0"
    config: str | None = "sample-100BT"
    begin: str | None = "<s>"


@hookimpl
def nestopt_register_datasets(register: Register) -> None:
    """Register the datasets of this file."""
    register("stdlib", Stdlib)
    register("files", Files)
    register("documents", Documents)
    register("fineweb_edu", FinewebEdu)
