"""The page on accelerators: its tables are what is counted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import launches
from benchmarks.launches import LARGE, MODES, STACKS, TRANSFORMERS, closed, layer_costs, layers, row, stack_cost
from nestopt.train.planning import Rates

DOCS = Path(__file__).parents[2] / "docs"
TABLES = (DOCS / "launches.inc").read_text(encoding="utf-8")
QUICK = ["attention", "cms", "deltanet", "gated_linear", "linear_attention", "momentum", "retnet", "window_attention"]
CLOSED = [name for name, level in layers().items() if closed(level)]


def rows(title: str) -> dict[str, list[str]]:
    """The cells of the table under a heading, by the first of them."""
    part = TABLES.split(f"### {title}\n")[1].split("###")[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if "`" in line]
    return {line[0].strip("`"): line for line in cells}


def test_the_tables_have_every_layer_and_every_stack() -> None:
    assert list(rows(MODES[0].capitalize())) == list(rows(MODES[1].capitalize())) == CLOSED
    assert list(rows(MODES[2].capitalize())) == [name for name in CLOSED if not name.startswith("cms")]
    assert list(rows("A step of an optimizer")) == list(STACKS)
    assert TABLES.startswith(f"{LARGE}, bfloat16. Rates: {Rates.stated().source}.\n")
    page = (DOCS / "accelerator.md").read_text(encoding="utf-8")
    assert re.search(r"## Counted\n.*python benchmarks/launches\.py.*include} launches\.inc", page, re.DOTALL)
    assert "include} api/limits.inc" in page
    assert f"B {launches.SMALL.batch}, T {launches.SMALL.tokens} ({launches.FEW_TOKENS} where" in page


@pytest.mark.parametrize("name", QUICK)
def test_a_layer_does_what_the_tables_say(name: str) -> None:
    for mode, cost in layer_costs(layers()[name], LARGE):
        assert rows(mode.capitalize())[name] == row(name, cost, Rates.stated())


@pytest.mark.parametrize("stack", ["adamw", "muon", "m3", "shampoo"])
def test_an_optimizer_does_what_the_tables_say(stack: str) -> None:
    cost = stack_cost(stack, TRANSFORMERS["large"])
    assert rows("A step of an optimizer")[stack] == row(stack, cost, Rates.stated())


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CLOSED if name not in (*QUICK, "memora", "atlas")])
def test_other_layers_do_what_the_tables_say(name: str) -> None:
    """All but two that run as `moneta` does, each for a minute."""
    test_a_layer_does_what_the_tables_say(name)
