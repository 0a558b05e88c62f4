"""The README: every Python block runs by itself, every YAML block loads, and every link to a file leads somewhere."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

import nestopt
from nestopt.core import Level

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> dict[str, str]:
    """The fenced blocks in `language`, by the heading they stand under."""
    found, heading = {}, ""
    for match in re.finditer(r"^## ([^\n]+)$|^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL):
        if match[1]:
            heading = match[1]
        elif match[2] == language:
            name = (
                heading if heading not in found else f"{heading}, {sum(key.startswith(heading) for key in found) + 1}"
            )
            found[name] = match[3]
    return found


def run(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that `code` leaves behind, run as a file of its own in `folder`."""
    monkeypatch.chdir(folder)
    file = folder / "block.py"
    file.write_text(code, encoding="utf-8")
    return runpy.run_path(str(file))


def test_there_are_the_examples_it_promises() -> None:
    assert list(blocks("python")) == [
        "Swap an optimizer",
        "Compose a stack",
        "Use a layer",
        "Write a level",
        "Learn while reading",
        "One object, three roles",
    ]
    assert README[: README.index("## Write a level")].count("\n") < 150
    assert list(blocks("yaml")) == ["Compose a stack"]
    assert list(blocks("sh")) == ["Start", "Start, 2", "Outgrow one machine"]


@pytest.mark.parametrize("name", blocks("python"))
def test_python_blocks_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(blocks("python")[name], tmp_path, monkeypatch)


def test_explain_prints_what_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(blocks("python")["Swap an optimizer"], tmp_path, monkeypatch)
    assert capsys.readouterr().out == blocks("text")["Swap an optimizer"]


def test_the_yaml_stack_is_the_python_stack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "stack.yaml"
    file.write_text(blocks("yaml")["Compose a stack"], encoding="utf-8")
    stack = nestopt.load(file)
    assert isinstance(stack, Level)
    assert stack == run(blocks("python")["Compose a stack"], tmp_path, monkeypatch)["stack"]


def test_links_to_files_lead_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert len(links) > 8
    assert [link for link in links if not (ROOT / link).exists()] == []
