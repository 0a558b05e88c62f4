"""Errors that say what a user gave and can't be used. Importing them needs nothing of the extra `train`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class CorpusError(ValueError):
    """A corpus cannot be made: nothing at the path, no text in it, or too little of it."""


class CheckpointError(RuntimeError):
    """A file cannot be read as a checkpoint; the message names the file and the reason."""


class TrainingError(RuntimeError):
    """A run can't go on; the message says what failed, at which step and in which process."""


class MissingExtra(ImportError):
    """A package of an extra is not installed; the message names both."""


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Import packages of an extra of nestopt within this.

    Raises:
        MissingExtra: one of them is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingExtra(f"{error.name} is not installed; pip install 'nestopt[{name}]'", name=error.name) from None
