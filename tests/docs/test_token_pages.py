"""Every level on tokens has a page, and what the pages, their tables and their pictures show is what happens."""

from __future__ import annotations

import doctest
import importlib
import math
import re
import runpy
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import pytest
import torch

import nestopt
from nestopt.core import AssociativeMemory, Gate
from nestopt.core.memories import Mlp, Window
from nestopt.core.part import Channels, Heads
from nestopt.core.registry import registry
from nestopt.core.retentions import Decay
from nestopt.core.tree import tree_map

DOCS = Path(__file__).parents[2] / "docs"
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted((DOCS / "tokens").glob("*.md"))}
LEVELS = sorted(set(PAGES) - {"index", "step", "self_modifying", "cms", "mac", "mesa", "log_linear"})
"""Presets of one associative memory, whose pages are alike."""

ON_GRADIENTS = {"deep_momentum"}
"""Associative memories whose page is among the levels on gradients."""


@pytest.fixture(scope="module")
def table() -> dict[str, Any]:
    return runpy.run_path(str(DOCS / "figures" / "token_table.py"))


@pytest.fixture
def recall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The script of the pictures, which writes to `tmp_path`."""
    names = runpy.run_path(str(DOCS / "figures" / "recall.py"))
    monkeypatch.setitem(names["main"].__globals__, "MADE", tmp_path)
    return names["main"].__globals__


def test_every_level_on_tokens_has_a_page(table: dict[str, Any], recall: dict[str, Any]) -> None:
    classes = {name: registry.get("level", name) for name in registry.names("level")}
    presets = {name for name, cls in classes.items() if issubclass(cls, AssociativeMemory)}  # type: ignore[arg-type]
    presets = {name for name in presets if classes[name].__module__.startswith("nestopt.")}
    assert set(LEVELS) == presets - ON_GRADIENTS - {"associative_memory"}
    assert sorted(table["FLOPS"]) == sorted(table["STATE"]) == LEVELS
    assert sorted(recall["PICTURES"]) == LEVELS
    contents = re.search(r"```\{toctree\}.*?\n\n(.*?)```", PAGES["index"], re.DOTALL)
    assert contents is not None
    assert sorted(contents[1].split()) == sorted(set(PAGES) - {"index"})


@pytest.mark.parametrize("name", LEVELS)
def test_a_page_has_all_its_parts(name: str) -> None:
    page = PAGES[name]
    assert page.startswith(f"# `{name}`\n")
    heads = ["In chunks", "State and cost", "Conventions and defaults", "Beside the paper", "Example"]
    assert re.findall(r"^## (.*)$", page, re.MULTILINE) == heads
    assert "$$" in page.split("## In chunks")[0]
    assert set(re.findall(rf"```\{{include\}} made/{name}-(\w+)\.inc", page)) == {"figure", "cost", "defaults"}
    for role, target in re.findall(r"\{py:(class|func|mod)\}`([\w.]+)`", page):
        module, _, item = target.rpartition(".")
        within = importlib.import_module(target if role == "mod" else module)
        found = within if role == "mod" else getattr(within, item)
        assert isinstance(found, type) if role == "class" else found is not None, target


def test_pages_name_the_arguments_that_there_are() -> None:
    """A call of a level or a part that stands in a page's text is one that can be made, but for an ellipsis."""
    names = {name: getattr(nestopt.levels, name) for name in nestopt.levels.__all__}
    parts = (Channels, Gate, Heads, Decay, Window)
    names |= {part.__name__: part for part in parts} | {"c": 8}
    calls = []
    for page in PAGES.values():
        prose = re.sub(r"^```\{testcode\}\n.*?^```$", "", page, flags=re.MULTILINE | re.DOTALL)
        calls += [call for call in re.findall(r"`(?:\w+=)?(\w+\([^`]*\))`", prose) if call.isascii()]
    calls = [call for call in calls if call.split("(")[0] in names]
    assert len(calls) > 6
    for call in calls:
        assert isinstance(eval(call, dict(names)), (nestopt.Level, *parts)), call


@pytest.mark.parametrize("name", sorted(set(PAGES) - {"index"}))
def test_examples_print_what_pages_say(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    blocks = re.findall(r"^```\{(testcode|testoutput)\}\n(.*?)^```$", PAGES[name], re.MULTILINE | re.DOTALL)
    assert [kind for kind, _ in blocks] == ["testcode", "testoutput"]
    (_, code), (_, wanted) = blocks
    assert len(code.splitlines()) <= 16
    exec(compile(code, f"{name}.md", "exec"), {"__name__": "example"})  # a page brings its own imports
    printed = capsys.readouterr().out
    assert doctest.OutputChecker().check_output(wanted, printed, doctest.ELLIPSIS), f"printed:\n{printed}"


@pytest.mark.parametrize("name", LEVELS)
def test_formulas_are_what_is_counted(name: str, table: dict[str, Any]) -> None:
    level = table["preset"](name)
    for dim, tokens in ((64, 512), (16, 256)):
        found, size = table["measure"](level, dim, tokens), table["size_of"](level, dim, tokens)
        assert found.flops == pytest.approx(table["FLOPS"][name].value(size), rel=1e-12)
        assert found.state == table["STATE"][name].value(size)
        if isinstance(level.memory, Mlp):
            gates = len(nestopt.core.gates_of(level))
            assert found.pending == (level.chunk_size - 1) * (2 * dim + 1 + gates)


def test_the_table_says_what_levels_are(table: dict[str, Any]) -> None:
    level = nestopt.levels.deltanet()
    cells = [cell.strip() for cell in table["row"]("deltanet", level).split("|")[1:-1]]
    assert cells == ["[`deltanet`](deltanet.md)", "matrix", "l2", "gd", "all", "`delta_rule`"]
    costs = table["cost_row"]("deltanet", level, table["measure"](level, 16, 128))
    wanted = ["[`deltanet`](deltanet.md)", "1", "256", f"{6 * 16**2 + 8 * 32 * 16:,}"]
    assert [cell.strip() for cell in costs.split("|")[1:-1]] == wanted
    costs = table["cost"]("titans", table["Measured"](5.0, 6, 63 * (2 * 64 + 4), 0))
    assert "$(C - 1)(2D + 4)$" in costs


def errors_by_hand(k: torch.Tensor, v: torch.Tensor, step: Any) -> torch.Tensor:
    """`[PAIRS, PAIRS]` of a matrix that `step(M, k, v)` writes."""
    m = torch.zeros(v.shape[1], k.shape[1], dtype=k.dtype)
    wrong = torch.full((len(k), len(k)), torch.nan, dtype=k.dtype)
    for t in range(len(k)):
        m = step(m, k[t], v[t])
        for s in range(t + 1):
            wrong[s, t] = (m @ k[s] - v[s]).norm() / v[s].norm()
    return wrong


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("linear_attention", lambda m, k, v: m + torch.outer(v, k)),
        ("gated_linear", lambda m, k, v: 0.97 * m + torch.outer(v, k)),
        ("deltanet", lambda m, k, v: m + 0.5 * torch.outer(v - m @ k, k)),
        ("gated_deltanet", lambda m, k, v: 0.97 * m + 0.5 * torch.outer(v - 0.97 * m @ k, k)),
        ("gla", lambda m, k, v: 0.97 * m + torch.outer(v, k)),
        ("kda", lambda m, k, v: 0.97 * m + 0.5 * torch.outer(v - 0.97 * m @ k, k)),
        ("oja", lambda m, k, v: m + 0.5 * torch.outer(v, k - m.mT @ v)),
    ],
)
def test_a_picture_shows_the_errors_of_the_memory(name: str, step: Any, recall: dict[str, Any]) -> None:
    (shown,) = recall["PICTURES"][name]().values()
    k, v = (x[0, :, 0] for x in recall["pairs"](shown.level))
    torch.testing.assert_close(recall["recall"](shown), errors_by_hand(k, v, step), rtol=0, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize("name", ["titans", "titans, raw, with delta decay"])
def test_asking_within_a_chunk_is_what_the_token_itself_was_answered_and_writes_nothing(
    name: str, recall: dict[str, Any]
) -> None:
    level = recall["PICTURES"]["titans"]()[name].level
    k, v = recall["pairs"](level)
    starts = [level.learned_start(recall["DIM"], recall["DIM"]) for _ in range(recall["HEADS"])]
    learned = {key: torch.stack([one[key].double() for one in starts]) for key in starts[0]}
    state = None
    for t in range(20):  # into the second chunk
        y, state = nestopt.ops.run(level, *(x[:, t : t + 1] for x in (k, k, v)), state=state, learned=learned)
        before = tree_map(torch.clone, state)
        answers = recall["asked"](level, k[0, : t + 1, 1], state, 1)
        torch.testing.assert_close(answers[-1], y[0, 0, 1], rtol=0, atol=1e-10)
        torch.testing.assert_close(state, before, rtol=0, atol=0)


def test_a_picture_is_the_same_each_time_and_says_what_it_shows(tmp_path: Path, recall: dict[str, Any]) -> None:
    made = []
    for _ in range(2):
        recall["make"]("retnet")
        made.append((tmp_path / "retnet.svg").read_text(encoding="utf-8"))
    assert made[0] == made[1]
    xml.etree.ElementTree.fromstring(made[0])
    words = (tmp_path / "retnet-figure.inc").read_text(encoding="utf-8")
    for name, shown in recall["PICTURES"]["retnet"]().items():
        errors = recall["recall"](shown)
        last, every = errors[-8:, -1].mean(), errors[:, -1].mean()
        assert f"{name}: {last:.2f} for the last 8, {every:.2f} for all" in words


def test_the_picture_of_the_step_shows_who_diverges(tmp_path: Path, recall: dict[str, Any]) -> None:
    recall["make_step"]()
    words = (tmp_path / "step-figure.inc").read_text(encoding="utf-8")
    for alike in (False, True):
        greatest = float(recall["surprises"](alike, "normalized", 1.0).max())
        assert greatest < 3
        assert f"normalized, lr = 1: {greatest:.2g}" in words
    assert not math.isfinite(float(recall["surprises"](True, "raw", 0.5).max()))
    assert "raw, η = 0.5: not finite" in words
    xml.etree.ElementTree.parse(tmp_path / "step.svg")
