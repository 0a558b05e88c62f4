"""The built-in datasets, registered by the hook that plugins use."""

from __future__ import annotations

from nestopt.core.dataset import Dataset
from nestopt.core.hookspecs import Register, hookimpl
from nestopt.train.text import Corpus, from_path, standard_library


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


@hookimpl
def nestopt_register_datasets(register: Register) -> None:
    """Register the datasets of this file."""
    register("stdlib", Stdlib)
    register("files", Files)
