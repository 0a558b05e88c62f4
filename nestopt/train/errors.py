"""Errors that say what a user gave and can't be used. Importing them needs nothing of the extra `train`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from nestopt.config import ConfigError


class CorpusError(ValueError):
    """A corpus cannot be made: nothing at the path, no text in it, or too little of it."""


class CheckpointError(RuntimeError):
    """A run's folder, or a file of a checkpoint, can't be used; the message names it and the reason."""


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


@contextmanager
def damaged(path: str | os.PathLike[str]) -> Iterator[None]:
    """Take apart within this what the file at `path` says.

    Raises:
        CheckpointError: something is missing in it, or is not of the kind that it must be.
    """
    try:
        yield
    except (CheckpointError, ConfigError, CorpusError, torch.cuda.OutOfMemoryError):
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        what = "it is nested too deeply" if isinstance(error, RecursionError) else repr(error)
        raise CheckpointError(f"{path}: is damaged, or of another program ({what[:200]})") from error


def whole_number(value: object, name: str, least: int = 0) -> int:
    """Return a value that a file has, if it is a whole number of at least `least`. Raises ValueError."""
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**63:
        raise ValueError(f"{name} is {value!r}, not a whole number of {least} or more")
    return value
