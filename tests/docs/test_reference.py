"""The reference: every public name has its place, and what it says of other projects' names is so."""

from __future__ import annotations

import importlib
import inspect
import pydoc
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "docs"
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in (FOLDER / "reference").glob("*.md")}
ALSO = {"nestopt.core": {"nestopt.core.part.FieldError"}, "nestopt.models": {"HopeConfig", "HopeForCausalLM"}}
"""Names that a package has beyond its `__all__`."""


@pytest.mark.parametrize("page", sorted(set(PAGES) - {"index", "derivations", "levels", "train"}))
def test_a_page_has_the_public_names_of_its_package(page: str) -> None:
    package = "nestopt" if page == "nestopt" else f"nestopt.{page}"
    listed = re.findall(r"^\.\. (?:auto|py:data::)(?:\w+::)? ?([\w.]+)$", PAGES[page], re.MULTILINE)
    assert len(listed) == len(set(listed))
    module = importlib.import_module(package)
    public = {name for name in module.__all__ if not inspect.ismodule(getattr(module, name))}
    if page in ("core", "config"):  # what they share with these two is described there
        shared = [vars(importlib.import_module(name)) for name in ("nestopt", "nestopt.parts")]
        public -= {name for name in public for names in shared if names.get(name) is getattr(module, name)}
    assert set(listed) - ALSO.get(package, set()) == public


def test_what_is_listed_by_its_whole_name_is_there_and_no_name_is_private() -> None:
    text = "\n".join(PAGES.values())
    listed = re.findall(r"^\.\. auto\w+:: (nestopt\.[\w.]+)$", text, re.MULTILINE)
    assert listed
    for name in listed:
        assert pydoc.locate(name) is not None, name
    assert not re.search(r"^\.\. auto\w+:: .*\b_\w", text, re.MULTILINE)


def test_every_page_is_in_the_index() -> None:
    (contents,) = re.findall(r":hidden:\n\n(.*?)```", PAGES["index"], re.DOTALL)
    assert sorted(contents.split()) == sorted(set(PAGES) - {"index"})


@pytest.mark.parametrize("project", ["python", "torch", "numpy"])
def test_names_of_other_projects_are_theirs(project: str) -> None:
    first, _, _, *lines = (FOLDER / "inventories" / f"{project}.txt").read_text(encoding="utf-8").splitlines()
    assert first == "# Sphinx inventory version 1"  # the one that is plain text
    for name, kind, page in map(str.split, lines):
        importlib.import_module(name.rpartition(".")[0] or "builtins")
        thing = pydoc.locate(name)
        assert thing is not None, name
        assert inspect.isclass(thing) == (kind in ("class", "exception")) or kind == "data", name
        assert page.endswith(".html")
