"""`checkpoint.json`: which files belong together, what else was saved, and which older checkpoints are kept."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import zlib
from pathlib import Path
from typing import Any

from nestopt.config.files import replacing
from nestopt.train.checkpoints.file import check_json
from nestopt.train.errors import CheckpointError, damaged, whole_number
from nestopt.train.folder import read_file

FORMAT, VERSION = "nestopt-parts", 2
_NAME = re.compile(r"checkpoint-(\d+)-part-(\d+)-of-(\d+)\.safetensors|checkpoint-(\d+)\.json", re.ASCII)


@dataclasses.dataclass(frozen=True)
class Kept:
    """A checkpoint of a folder.

    Attributes:
        number: of the save.
        parts: how many files it has.
        score: held-out loss of its weights, None where it was not measured.
    """

    number: int
    parts: int
    score: float | None = None

    @property
    def files(self) -> list[str]:
        """Names of its parts, in order."""
        return [f"checkpoint-{self.number}-part-{i + 1}-of-{self.parts}.safetensors" for i in range(self.parts)]

    @property
    def index(self) -> str:
        """The name of its index once it is not the last."""
        return f"checkpoint-{self.number}.json"


@dataclasses.dataclass(frozen=True)
class Index:
    """What `checkpoint.json` says.

    Attributes:
        number: of the save among those of the folder.
        files: names of the parts, in the folder.
        meta: values that were saved.
        kept: the checkpoints of the folder, this one last.
        stale: names of files of checkpoints that are not kept, removed once this is written.
    """

    number: int
    files: list[str]
    meta: dict[str, Any]
    kept: list[Kept]
    stale: list[str]

    def write(self, path: Path) -> None:
        """Write it at once."""
        check_json(self.meta, "meta")
        content = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(self)}
        with replacing(path) as temporary:
            temporary.write_text(json.dumps({**content, "checksum": _checksum(content)}, indent=1), encoding="utf-8")


def after(last: Index | None, new: Kept, meta: dict[str, Any], keep: int) -> Index:
    """Return the index of the folder's next checkpoint: the last `keep` stay, and the one with the least score."""
    found = [*(last.kept if last else []), new]
    measured = [item for item in found if item.score is not None and math.isfinite(item.score)]
    best = min(measured, key=lambda item: item.score or 0.0, default=None)
    kept = [item for item in found if item in found[-keep:] or item is best]
    stale = [name for item in found if item not in kept for name in [*item.files, item.index]]
    return Index(new.number, new.files, meta, kept, stale)


def read_index(path: Path) -> Index:
    """Read an index.

    Raises:
        CheckpointError: there is none, it is damaged, of a newer version, or names files outside its folder.
    """
    try:
        text = read_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror}") from None
    with damaged(path):
        content = json.loads(text)
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}")
        version = whole_number(content["version"], "version", 1)
        if version > VERSION:
            raise CheckpointError(
                f"{path}: was written by a newer nestopt (version {version}; this one reads up to {VERSION})"
            )
        if version > 1 and content.pop("checksum") != _checksum(content):
            raise ValueError("it is not as it was saved")
        number, files = whole_number(content["number"], "number"), list(content["files"])
        if not files or not isinstance(content["meta"], dict):
            raise ValueError("files or meta is missing")
        for name in [*files, *content.get("stale", [])]:
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                raise ValueError(f"{name!r} is no name of a checkpoint's file in its folder")
        kept = [
            Kept(
                whole_number(item["number"], "number"),
                whole_number(item["parts"], "parts", 1),
                None if item["score"] is None else float(item["score"]),
            )
            for item in content.get("kept", [{"number": number, "parts": len(files), "score": None}])
        ]
        if (kept[-1].number, kept[-1].files) != (number, files):
            raise ValueError("files are not those of the last that is kept")
        return Index(number, files, content["meta"], kept, content.get("stale", []))


def _checksum(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())
