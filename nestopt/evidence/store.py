"""The file of a claim's rows: whatever was measured once is not measured again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nestopt.config.files import write
from nestopt.train.errors import damaged
from nestopt.train.folder import check_file, read_file


class Store:
    """A JSON file with rows, each of which has a key that says what it is of.

    Args:
        path: of the file; what is there is gone on with.

    Raises:
        CheckpointError: something else is there.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._rows = path, dict[str, dict[str, Any]]()
        check_file(path, own=True)
        if path.exists():
            with damaged(path):
                self._rows = {str(row["key"]): dict(row) for row in json.loads(read_file(path))["rows"]}

    def once(self, key: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the row of this key; measured, and kept at once, if there is none."""
        if key not in self._rows:
            self._rows[key] = {"key": key, **json.loads(json.dumps(measure()))}
            self.save()
        return self._rows[key]

    def save(self, **more: Any) -> None:
        """Write the rows, with more to say beside them."""
        write(json.dumps({**more, "rows": list(self._rows.values())}, indent=1) + "\n", self.path)
