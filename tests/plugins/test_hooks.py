"""Every hook: nestopt's own come by it, a page shows it in code that runs, the kit writes it, and a check tries it."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from nestopt.core import hookspecs
from nestopt.core.registry import KINDS, registry
from nestopt.plugins import templates
from nestopt.plugins.check import CHECKS

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_built_in_comes_by_the_hook_that_plugins_use(kind: str) -> None:
    hook = KINDS[kind][1]
    own = [plugin for plugin in registry.plugins() if plugin.source.startswith("nestopt.")]
    owners = [plugin for plugin in own if any(of == kind for of, _ in plugin.provides)]
    assert owners
    for plugin in owners:
        function = getattr(sys.modules[plugin.source], hook)
        assert hasattr(function, f"{hookspecs.PROJECT}_impl")


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_shows_it_in_code_that_runs(kind: str) -> None:
    blocks = [
        block
        for page in sorted(DOCS.rglob("*.md"))
        for block in re.findall(r"```\{testcode\}\n(.*?)```", page.read_text(), re.DOTALL)
    ]
    assert any(f"@nestopt.hookimpl\n    def {KINDS[kind][1]}(register):" in block for block in blocks)
    assert KINDS[kind][1] in (DOCS / "plugins.md").read_text() + (DOCS / "writing-a-level.md").read_text()


def test_the_kit_writes_and_checks_it() -> None:
    assert KINDS.keys() == templates.HOOKS.keys() == CHECKS.keys()
