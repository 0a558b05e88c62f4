"""Every level on gradients has a page, and what the pages show is what happens."""

from __future__ import annotations

import doctest
import re
import runpy
from pathlib import Path

import pytest

import nestopt
from nestopt.core.registry import registry

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted((DOCS / "levels").glob("*.md"))}

COMPOSED = {"chain", "parallel", "nest"}
TOGETHER = {
    "composing": COMPOSED,
    "links": {
        "cautious",
        "centralize",
        "clip",
        "gradient_correction",
        "normalize",
        "sign",
        "trust_ratio",
        "weight_decay",
    },
    "recipes": {"adamuon", "grokfast", "lamb", "lion_chain", "mars", "normuon"},
}
"""Levels that share a page."""
OF_SEVERAL = set().union(*TOGETHER.values())
ON_TOKENS = sorted({path.stem for path in (DOCS / "tokens").glob("*.md")} - {"index", "step"} - set(PAGES))
ELSEWHERE = {
    "associative_memory": "idea.md",
    **dict.fromkeys(("mag", "mal"), "tokens/mac.md"),
    **{name: f"tokens/{name}.md" for name in ON_TOKENS},
}
"""Levels that are explained on another page: the generic one, and those whose place is in a layer."""

OPTIONS = doctest.ELLIPSIS


def builtin() -> set[str]:
    return {name for name in registry.names("level") if registry.get("level", name).__module__.startswith("nestopt.")}


def test_every_level_on_gradients_has_a_page() -> None:
    assert set(PAGES) == builtin() - OF_SEVERAL - set(ELSEWHERE) | {*TOGETHER, "index"}
    assert builtin() >= OF_SEVERAL | set(ELSEWHERE)
    for name, page in ELSEWHERE.items():
        assert name in (DOCS / page).read_text(encoding="utf-8"), f"{page} says nothing of {name}"
    for page, names in TOGETHER.items():
        for name in names:
            assert f"`{name}`" in PAGES[page].splitlines()[0]


def test_the_index_lists_every_page_and_the_scripts_draw_and_measure_each() -> None:
    levels = [name for name in PAGES if name not in ("index", *TOGETHER)]
    contents = re.search(r"```\{toctree\}.*?\n\n(.*?)```", PAGES["index"], re.DOTALL)
    assert contents is not None
    assert sorted(contents[1].split()) == sorted([*levels, *TOGETHER])
    assert sorted(runpy.run_path(str(DOCS / "figures" / "level_table.py"))["LEVELS"]) == levels
    assert sorted(runpy.run_path(str(DOCS / "figures" / "trajectories.py"))["PICTURES"]) == sorted([*levels, *TOGETHER])


@pytest.mark.parametrize("name", sorted(set(PAGES) - {"index"}))
def test_a_page_has_all_its_parts(name: str) -> None:
    heads = ["State and cost", "Conventions and defaults", "Beside the paper", "Example"]
    assert re.findall(r"^## (.*)$", PAGES[name], re.MULTILINE) == heads
    assert "$$" in PAGES[name]
    kinds = {"figure"} if name in TOGETHER else {"figure", "state", "defaults"}
    assert set(re.findall(rf"```\{{include\}} made/{name}-(\w+)\.inc", PAGES[name])) == kinds
    for target in re.findall(r"\{py:class\}`([\w.]+)`", PAGES[name]):
        module, _, cls = target.rpartition(".")
        assert isinstance(getattr(__import__(module, fromlist=[cls]), cls), type), target


@pytest.mark.parametrize("name", [*sorted(set(PAGES) - {"index"}), "../optimizers"])
def test_examples_print_what_pages_say(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (DOCS / "levels" / f"{name}.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```\{(testcode|testoutput)\}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert blocks
    names = {"__name__": "example"}  # a page brings its own imports
    for kind, block in blocks:
        if kind == "testcode":
            capsys.readouterr()
            exec(compile(block, f"{name}.md", "exec"), names)
        else:
            printed = capsys.readouterr().out
            assert doctest.OutputChecker().check_output(block, printed, OPTIONS), f"printed:\n{printed}"


@pytest.mark.parametrize("name", sorted(set(PAGES) - {"index"}))
def test_examples_are_short(name: str) -> None:
    (code,) = re.findall(r"^```\{testcode\}\n(.*?)^```$", PAGES[name], re.MULTILINE | re.DOTALL)
    assert len(code.splitlines()) <= 16


def test_equations_are_of_levels_that_exist() -> None:
    for name in set(PAGES) - {"index", *TOGETHER}:
        assert PAGES[name].startswith(f"# `{name}`\n")
        assert nestopt.build("level", name).label == name
