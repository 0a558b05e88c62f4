"""What is declared is declared once: pyproject.toml beside the pages and the tools that say the same."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it

ROOT = Path(__file__).parent.parent


def toml(path: str) -> dict[str, Any]:
    return tomllib.loads((ROOT / path).read_text())


DECLARED = toml("pyproject.toml")
PROJECT = DECLARED["project"]
PYTHON = PROJECT["requires-python"].removeprefix(">=")
TORCH = next(need for need in PROJECT["dependencies"] if need.startswith("torch>=")).removeprefix("torch>=")


def test_every_python_from_the_oldest_on_is_a_classifier() -> None:
    found = [re.fullmatch(r"Programming Language :: Python :: 3\.(\d+)", line) for line in PROJECT["classifiers"]]
    minors = [int(match[1]) for match in found if match]
    assert f"3.{minors[0]}" == PYTHON
    assert minors == list(range(minors[0], minors[-1] + 1))
    assert DECLARED["tool"]["ruff"]["target-version"] == f"py{PYTHON.replace('.', '')}"
    for path in ROOT.glob("plugins/*/pyproject.toml"):
        assert toml(str(path))["project"]["requires-python"] == f">={PYTHON}", path


def test_every_need_has_an_oldest_release_and_no_other_bound() -> None:
    """As `.ci/declared.py` installs it."""
    extras = PROJECT["optional-dependencies"]
    for need in (*PROJECT["dependencies"], *extras["train"], *extras["test"]):
        assert re.fullmatch(r"[\w-]+>=[\d.]+", need) or need == "nestopt[train]", need


@pytest.mark.parametrize("page", ["README.md", "docs/start.md"])
def test_pages_say_the_same(page: str) -> None:
    text = " ".join((ROOT / page).read_text().split())
    assert f"Python {PYTHON} or newer and PyTorch {TORCH} or newer" in text
