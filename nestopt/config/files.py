"""Files that are whole or not there."""

from __future__ import annotations

import errno
import glob
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from nestopt.core.part import nearest


def write(text: str, path: str | os.PathLike[str]) -> None:
    """Replace the file at `path` with text at once: a process that dies here leaves it as it was. Makes its folder."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def nearest_file(path: Path, suffixes: Iterable[str]) -> str:
    """Return ` Did you mean 'x.yaml'?` for the file beside `path` whose name is closest, or nothing."""
    try:
        there = [other.name for other in path.parent.iterdir() if other.suffix in suffixes]
    except OSError:
        return ""
    # that both end in .yaml makes them no more alike
    return nearest(path.name, [name for name in there if nearest(path.stem, [Path(name).stem])])


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Replace a file at once: write to the path that this gives, and when the block ends that file becomes ``path``.

    If the block raises, or the process dies, ``path`` is as it was. What a killed process leaves behind is a hidden
    folder beside ``path``, removed by the next writer; so one process at a time may write to a path.

    Raises:
        OSError: of the block or the system, with ``path`` for its file name.
    """
    target = Path(path)
    # "~" ends the name, so that writing "a" does not clear away what another process is writing to "a.b".
    for leftover in target.parent.glob(f".{glob.escape(target.name)}~*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    # A folder, since a library may make temporary files of its own beside the file that it writes (safetensors does).
    folder: Path | None = None
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}~", suffix=".tmp", dir=target.parent))
        temporary = folder / "new"
        temporary.touch()
        mode = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        temporary.chmod(mode)  # what the user's umask asks for; safetensors lets only the owner read
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, target)
        _sync_folder(target.parent)
    except OSError as error:
        if error.errno is None or error.filename == str(target):
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(target)) from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def making(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Make a folder at once: fill the one that this gives, and when the block ends that becomes ``path``.

    If the block raises, there is nothing at ``path``.

    Raises:
        FileExistsError: something is at ``path`` already.
    """
    target = Path(path)
    made = Path(tempfile.mkdtemp(prefix=f".{target.name}~", suffix=".tmp", dir=target.parent))
    try:
        yield made
        mask = os.umask(0)
        os.umask(mask)
        made.chmod(0o777 & ~mask)
        if os.path.lexists(target):  # an empty folder would be replaced
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        os.rename(made, target)
        _sync_folder(target.parent)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot open a folder
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
