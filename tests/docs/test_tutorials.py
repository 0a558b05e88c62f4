"""The tutorials are all there. The site's build runs them, with what they say of what they show as assertions."""

from __future__ import annotations

import re
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "docs" / "tutorials"
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.md")) if path.stem != "index"}
CELL = re.compile(r"^```\{code-cell\} python\n((?::[^\n]*\n)*)(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_all_eight_are_listed_and_each_is_a_notebook_to_download_with_its_claims_tried() -> None:
    listed = re.findall(r"^[\w-]+$", (FOLDER / "index.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(PAGES)
    assert len(PAGES) == 8
    for name, text in PAGES.items():
        assert text.startswith("---\nfile_format: mystnb\nkernelspec: {name: python3}\n---\n\n# ")
        assert f"{{nb-download}}`Download as a notebook <{name}.ipynb>`" in text
        assert any("remove-cell" in tags and "assert " in code for tags, code in CELL.findall(text)), name
