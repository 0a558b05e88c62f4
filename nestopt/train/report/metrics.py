"""A run's measurements over time: one JSON object a line, appended as they come."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from nestopt.config.files import replacing
from nestopt.train.folder import appending, check_file, saying

_NOT_IN_JSON = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class MetricsLog:
    """Appends records to a file of JSON lines, each of which is in the file when `append` returns.

    A line counts once its newline is written: what a crash left after the last one is cut off when the file is opened.
    JSON has no NaN and no infinity; they are written as the strings ``"nan"``, ``"inf"`` and ``"-inf"``, and `read`
    makes numbers of them again, so that a diverged run shows as one.

    Args:
        path: the file, made if it is not there. Its folder must exist.

    Raises:
        CheckpointError: a link is there, or anything but a file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._open()

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one record: names to numbers, strings, booleans or None.

        Raises:
            TypeError: for a value of another type (a tensor: take its ``.item()``).
        """
        line = _encode(record)
        with saying(self.path):
            self._file.write(line)
            self._file.flush()

    def truncate_after(self, step: int, *, again: str | None = None) -> None:
        """Drop the records whose ``"step"`` is greater than ``step``, which a resumed run will measure again.

        Args:
            step: the last that stays.
            again: what is measured again at that step itself; None for nothing.
        """
        kept = [record for record in read(self.path) if record.get("step", step) <= step]
        kept = [record for record in kept if record.get("step") != step or again not in record]
        self.close()
        with replacing(self.path) as temporary:
            temporary.write_text("".join(map(_encode, kept)), encoding="ascii")
        self._open()

    def close(self) -> None:
        """Close the file. A closed log takes no more records."""
        with saying(self.path):  # what a full disk has refused is tried once more
            self._file.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open(self) -> None:
        check_file(self.path, alone=True)
        if self.path.exists():
            text = self.path.read_bytes()
            if not text.endswith(b"\n"):
                os.truncate(self.path, text.rfind(b"\n") + 1)
        self._file = appending(self.path)


def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the records of a file that `MetricsLog` wrote, without a last line that a crash cut short.

    Raises:
        FileNotFoundError: if there is no file.
        ValueError: if another line is not a JSON object; the message has its number.
    """
    check_file(path)
    *lines, _ = Path(path).read_bytes().split(b"\n")  # after the last newline: nothing, or a line cut short
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number}: not a JSON object")
        records.append({name: _number(value) for name, value in record.items()})
    return records


def _encode(record: Mapping[str, Any]) -> str:
    plain = {}
    for name, value in record.items():
        if value is not None and not isinstance(value, (str, int, float)):
            raise TypeError(f"{name}: a record holds numbers, strings, booleans and None, not a {type(value).__name__}")
        plain[name] = str(float(value)) if isinstance(value, float) and not math.isfinite(value) else value
    return json.dumps(plain, allow_nan=False) + "\n"


def _number(value: Any) -> Any:
    return _NOT_IN_JSON.get(value, value) if isinstance(value, str) else value
