"""The tutorials run from top to bottom, as a reader runs them, and what they say of what they show holds."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "docs" / "tutorials"
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.md")) if path.stem != "index"}
NEEDS = {"compose-a-stack": "IPython", "teach-a-pretrained-model": "transformers"}
"""What is beyond the extra `test`; a notebook has the first by itself."""

CELL = re.compile(r"^```\{code-cell\} python\n((?::[^\n]*\n)*)(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_all_eight_are_listed_and_each_is_a_notebook_to_download_with_its_claims_tried() -> None:
    listed = re.findall(r"^[\w-]+$", (FOLDER / "index.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(PAGES)
    assert len(PAGES) == 8
    for name, text in PAGES.items():
        assert text.startswith("---\nfile_format: mystnb\nkernelspec: {name: python3}\n---\n\n# ")
        assert f"{{nb-download}}`Download as a notebook <{name}.ipynb>`" in text
        assert any("remove-cell" in tags and "assert " in code for tags, code in CELL.findall(text)), name


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_it_runs_within_a_minute_of_one_core(name: str, tmp_path: Path) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    code = "\n".join(code for _, code in CELL.findall(PAGES[name]))
    (tmp_path / "tutorial.py").write_text(code, encoding="utf-8")
    environment = {**os.environ, "MPLBACKEND": "agg", "OMP_NUM_THREADS": "1"}
    begun = _cpu()
    command = [sys.executable, "tutorial.py"]
    done = subprocess.run(command, check=False, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert _cpu() - begun < 60


def _cpu() -> float:
    """Seconds of the CPU that children which have ended took, theirs included."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
