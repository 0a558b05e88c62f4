"""Byte corpora: text split into a training and a held-out part, and training windows drawn from it."""

import hashlib
import itertools
import logging
import os
import platform
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nestopt.train.errors import CorpusError

logger = logging.getLogger(__name__)

HELD_OUT_ONE_IN = 20  # 5 % is held out
MIN_BYTES = 4096
MIN_FILES = 20  # with fewer, one file decides the split
HELD_OUT_SHARE = (0.01, 0.20)  # of the bytes: beyond it a few large files have fallen to one side

_NOT_LIBRARY = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "__pycache__"}


@dataclass(frozen=True, eq=False)
class Corpus:
    """Text as bytes in two disjoint parts; each array is one-dimensional ``uint8``, in memory.

    ``train_files`` and ``held_out_files`` count the files with bytes in each part. The parts share no file when the
    split is by file; when it is by bytes, the file at the cut may count in both.
    """

    name: str
    train: npt.NDArray[np.uint8]
    held_out: npt.NDArray[np.uint8]
    train_files: int
    held_out_files: int


def standard_library() -> Corpus:
    """Return the Python source text of the running interpreter's standard library, without its tests, split by file.

    Raises:
        CorpusError: if the interpreter has no source files (a zipped or frozen Python).
    """
    name = f"Python {platform.python_version()} standard library"
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = (path for path in _files(root, skip=_NOT_LIBRARY.__contains__) if path.suffix == ".py")
    texts = {_key(root, path): text for path in paths if (text := path.read_bytes())}
    if not texts:
        raise CorpusError(
            f"no source text of the standard library in {root}: this Python is zipped or frozen. "
            "Train on a text of your own with --data FILE_OR_FOLDER"
        )
    return _split(name, texts)


def from_path(path: str | os.PathLike[str]) -> Corpus:
    """Return a corpus from a file or a folder of one's own.

    A file is taken as the bytes that it is. Of a folder, every regular file below it counts that is neither hidden nor
    in a hidden folder, and is UTF-8 text (links to files are followed, links to folders are not).

    About 5 % is held out. A folder is split by file: a file's side is a hash of its path relative to the folder, and
    so does not change when other files come and go. A file, and a folder where that cannot be fair (fewer than 20
    files, or a held-out part of less than 1 % or more than 20 % of the bytes), is split by bytes instead: the last 5 %
    is held out, and up to as much again where that lets the cut fall on the end of a line.

    Raises:
        CorpusError: if ``path`` is not a file or a folder, holds no text, or fewer than 4,096 bytes.
    """
    root = Path(path)
    if not root.exists():
        raise CorpusError(f"no text to train on: {root} does not exist")
    if root.is_dir():
        texts, others = {}, 0
        for file in _files(root, skip=lambda name: name.startswith(".")):
            content = file.read_bytes()
            if not _is_text(content):
                others += 1
            elif content:
                texts[_key(root, file)] = content
        if others:
            logger.info("%s: %d files are not UTF-8 text and were left out", root, others)
        if not texts:
            raise CorpusError(f"no text to train on: {root} holds no UTF-8 text file ({others} files of other kinds)")
    elif root.is_file():
        texts = {os.fsencode(root.name): root.read_bytes()}
    else:
        raise CorpusError(f"no text to train on: {root} is neither a file nor a folder")
    size = sum(map(len, texts.values()))
    if size < MIN_BYTES:
        raise CorpusError(f"too little text to train on: {root} holds {size} bytes, at least {MIN_BYTES} are needed")
    return _split(root.resolve().name or str(root), texts)


def windows(
    tokens: Tensor, step: int, *, batch: int, length: int, seed: int, rank: int = 0, world: int = 1
) -> torch.LongTensor:
    """Draw training windows for one step: uniformly random stretches of ``length + 1`` consecutive tokens.

    A pure function of its arguments. The batch is drawn as one for all ranks and sliced, so that any number of ranks
    sees the same data, and a run resumes without a state of its data.

    Args:
        tokens: one-dimensional, usually ``uint8``.
        step: number of the training step, from 0.
        batch: windows in the step, over all ranks.
        length: inputs in a window; the one token more is the last target.
        seed: the run's seed for its data.
        rank, world: this process's number and the number of processes.

    Returns:
        ``[batch / world, length + 1]``, ``int64``, on the device of ``tokens``.

    Raises:
        ValueError: if the text is shorter than a window, the batch does not divide by ``world``, or a number is out of
            range.
    """
    if tokens.ndim != 1:
        raise ValueError(f"tokens must have one dimension, not the shape {tuple(tokens.shape)}")
    if length < 1 or batch < 1 or step < 0:
        raise ValueError(f"length and batch must be at least 1 and step at least 0: {length=}, {batch=}, {step=}")
    if not 0 <= rank < world:
        raise ValueError(f"rank must be in [0, world): {rank=}, {world=}")
    if batch % world:
        raise ValueError(f"batch must be a multiple of the number of processes: {batch=}, {world=}")
    if len(tokens) < length + 1:
        raise ValueError(f"a window takes {length + 1} tokens ({length=}), the text has only {len(tokens)}")
    # A hash, since generators seeded by neighbouring numbers (seed + step) would repeat each other's batches.
    mixed = hashlib.blake2b(f"{seed}:{step}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(mixed, "big"))
    starts = torch.randint(len(tokens) - length, (batch,), generator=generator)
    mine = starts[rank * batch // world : (rank + 1) * batch // world]
    positions = mine[:, None] + torch.arange(length + 1)
    return tokens[positions.to(tokens.device)].long()  # type: ignore[return-value]


def _files(root: Path, skip: Callable[[str], bool]) -> Iterator[Path]:
    """Yield regular files below ``root``, without the files and folders whose name is to be skipped."""
    for folder, subfolders, names in os.walk(root, onerror=_raise):
        subfolders[:] = [name for name in subfolders if not skip(name)]  # os.walk goes into those that are left
        yield from (path for name in names if not skip(name) and (path := Path(folder, name)).is_file())


def _raise(error: OSError) -> NoReturn:  # os.walk passes over a folder that it cannot read, if not told otherwise
    raise error


def _key(root: Path, path: Path) -> bytes:
    return os.fsencode(path.relative_to(root).as_posix())


def _is_text(content: bytes) -> bool:
    try:
        content.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return b"\0" not in content


def _is_held_out(key: bytes) -> bool:
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") % HELD_OUT_ONE_IN == 0


def _split(name: str, texts: dict[bytes, bytes]) -> Corpus:
    """Split texts, by path, into the two parts: by file where that is fair, else by bytes."""
    keys = sorted(texts)
    train = [texts[key] for key in keys if not _is_held_out(key)]
    held_out = [texts[key] for key in keys if _is_held_out(key)]
    share = sum(map(len, held_out)) / sum(map(len, texts.values()))
    if len(keys) >= MIN_FILES and HELD_OUT_SHARE[0] <= share <= HELD_OUT_SHARE[1]:
        return Corpus(name, _array(b"\n".join(train)), _array(b"\n".join(held_out)), len(train), len(held_out))
    if len(keys) > 1:
        logger.info("%s: %d files, %.1f %% held out by file; split by bytes instead", name, len(keys), 100 * share)
    return _split_bytes(name, [texts[key] for key in keys])


def _split_bytes(name: str, texts: list[bytes]) -> Corpus:
    text = b"\n".join(texts)
    tail = max(1, len(text) // HELD_OUT_ONE_IN)
    cut = len(text) - tail
    newline = text.rfind(b"\n", cut - tail, cut)
    if newline >= 0:
        cut = newline + 1
    ends = np.cumsum([len(part) + 1 for part in texts]) - 1
    starts = ends - [len(part) for part in texts]
    return Corpus(name, _array(text[:cut]), _array(text[cut:]), int((starts < cut).sum()), int((ends > cut).sum()))


def _array(text: bytes) -> npt.NDArray[np.uint8]:
    return np.frombuffer(text, dtype=np.uint8).copy()  # a copy can be written to, which torch.from_numpy asks for


STRETCHES = 16
"""The held-out text is so many stretches, evenly spread, so that it is not all from the first few files."""


def held_out_text(held_out: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.uint8]:
    """Return `size` bytes of the held-out text in a few long stretches (all of it, if it is no longer)."""
    if len(held_out) <= size:
        return held_out
    return np.concatenate([held_out[stretch] for stretch in _stretches(len(held_out), size)])


def text_beside(held_out: npt.NDArray[np.uint8], tested: int, size: int) -> npt.NDArray[np.uint8]:
    """Return at most `size` bytes of the held-out text that `held_out_text(held_out, tested)` has not."""
    stretches = _stretches(len(held_out), tested)
    between = [held_out[a.stop : b.start] for a, b in itertools.pairwise(stretches)]
    return held_out_text(np.concatenate([*between, held_out[stretches[-1].stop :]]), size)


def _stretches(length: int, size: int) -> list[slice]:
    if length <= size:
        return [slice(0, length)]
    each, over = divmod(size, STRETCHES)
    gap = (length - size) / max(1, STRETCHES - 1)
    found, position = [], 0.0
    for i in range(STRETCHES):
        n = each + (i < over)
        found.append(slice(round(position), round(position) + n))
        position += n + gap
    return found
