"""A folder that is written for hours: no links out of it, one writer at a time, and a notice when it is taken away."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from nestopt.config import ConfigError
from nestopt.train.errors import CheckpointError

log = logging.getLogger("nestopt")

INDEX = "checkpoint.json"
"""What names the parts that belong together: the checkpoint is what this says, and nothing else."""


def check_file(path: str | os.PathLike[str], *, own: bool = False, alone: bool = False) -> None:
    """Check that nothing is at `path`, or a file.

    Args:
        path: of it; it is not opened, which would wait for ever at a FIFO.
        own: it will be written: a link to a file is refused too.
        alone: it will be written to as it lies there: a file that has another name elsewhere is refused too.

    Raises:
        CheckpointError: something else is there.
    """
    try:
        found = os.stat(path, follow_symlinks=not (own or alone))
    except FileNotFoundError:
        return
    except OSError as error:  # a name that is too long, a file for a folder, a link to itself
        raise CheckpointError(f"{path}: can't be used: {error.strerror}") from None
    _check_kind(path, found, own, alone)


def _check_kind(path: str | os.PathLike[str], found: os.stat_result, own: bool, alone: bool) -> None:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a FIFO", stat.S_IFSOCK: "a socket", stat.S_IFLNK: "a link"}
    if not stat.S_ISREG(found.st_mode):
        kind = kinds.get(stat.S_IFMT(found.st_mode), "a device")
        how = "written" if own or alone else "read"
        raise CheckpointError(f"{path}: cannot be {how}, it is {kind}; have a file there, or nothing")
    if alone and found.st_nlink > 1:
        raise CheckpointError(f"{path}: cannot be written, it is a file that has another name too; have a copy there")


def check_place(option: str, path: Path) -> None:
    """Check before long work that its file, which an option names, will have a place. Raises ConfigError."""
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; give a file", option)
    check_file(path, own=True)
    if not path.parent.is_dir():
        raise ConfigError(f"{path} has no place, {path.parent} is no folder", option)
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(f"{path} has no place, {path.parent} can't be written", option)


def make_place(option: str, folder: Path, *names: str) -> None:
    """Make a folder, which an option names, for files of these names. Raises ConfigError where that can't be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ConfigError(f"{folder} can't be made, a file is in its way; give a folder", option) from None
    for name in names:
        check_place(option, folder / name)


def read_file(path: str | os.PathLike[str], most: int = 2**28) -> bytes:
    """Return what a file holds.

    Raises:
        CheckpointError: it is no file, or has more than `most` bytes.
        OSError: it is not there, or can't be read.
    """
    check_file(path)
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size > most:
            raise CheckpointError(f"{path}: is larger than {most:,} bytes, which no file of this name is")
        return file.read()


def appending(path: str | os.PathLike[str]) -> IO[str]:
    """Open a file to append text to, in UTF-8; made if it is not there.

    Raises:
        CheckpointError: it is a link, has another name elsewhere, or is no file.
    """
    check_file(path, alone=True)
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        handle = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link came in the meantime
            check_file(path, alone=True)
        raise
    try:
        _check_kind(path, os.fstat(handle), own=True, alone=True)
        return open(handle, "a", encoding="utf-8", newline="\n")
    except BaseException:
        os.close(handle)
        raise


class Hold:
    """The right to write to a folder, which one process at a time has; it ends with the process.

    Args:
        folder: of a run.
        file: in it, that stays as long as the run.

    Raises:
        CheckpointError: another process has it.
    """

    def __init__(self, folder: Path, file: Path) -> None:
        self.folder, self.file = folder, file
        self._seen = os.stat(folder)
        self._handles: list[int] = []
        try:
            self._lock()
        except BaseException:
            self.close()
            raise

    def _lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # Windows
            log.warning("%s: this system has no locks; let one run at a time write to it", self.folder)
            return
        problem: OSError | None = None
        # NFS locks only what is open for writing, which a folder can't be; where both can't be locked it is said
        for path, flags in ((self.folder, os.O_RDONLY), (self.file, os.O_RDWR | os.O_NONBLOCK)):
            try:
                self._handles.append(os.open(path, flags))  # as long as it is open, no other folder has its number
                fcntl.flock(self._handles[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                raise CheckpointError(
                    f"{self.folder}: another run is writing to this folder; stop that one first, or wait for its end"
                ) from None
            except OSError as error:
                problem = error
        log.warning("%s can't be locked (%s); let one run at a time write to it", self.folder, problem)

    def check(self) -> None:
        """Raise CheckpointError if the folder has been removed, moved or replaced since."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            if os.path.samestat(self._seen, os.stat(self.folder)) and self.file.exists():
                return
        raise CheckpointError(
            f"{self.folder}: the run's folder was removed or replaced while it ran; it stops, and writes no more"
        )

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let others write to it."""
        while self._handles:
            os.close(self._handles.pop())


@contextlib.contextmanager
def saying(path: str | os.PathLike[str]) -> Iterator[None]:
    """Write within this to `path`: an OSError that does not say where says so."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
