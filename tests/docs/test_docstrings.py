"""Docstrings: no escape that Python has eaten, and mathematics that is whole."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import nestopt

PACKAGE = Path(nestopt.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

CODE = re.compile(r"``.*?``|`[^`]*`", re.DOTALL)
MATH = re.compile(r"\$\$(.+?)\$\$|\$(.+?)\$", re.DOTALL)


def docstrings(source: str) -> Iterator[tuple[int, bool, str]]:
    """Every string that stands by itself, of attributes too: its line, whether it has backslashes as such, its text."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            written = ast.get_source_segment(source, node.value) or ""
            yield node.lineno, not written.startswith(("r", "R")) and "\\" in written, node.value.value


def faults(text: str) -> list[str]:
    """What is wrong with a docstring, in words."""
    found = [f"the control character {mark!r}" for mark in text if ord(mark) < 32 and mark != "\n"]
    prose = CODE.sub("", text)
    if prose.count("$$") % 2 or prose.replace("$$", "").count("$") % 2:
        found.append("a $ without its other")
    for match in MATH.finditer(prose):
        math = match[1] or match[2]
        bare = math.replace(r"\{", "").replace(r"\}", "")
        if bare.count("{") != bare.count("}"):
            found.append(f"braces that do not close: {math}")
        if re.search(r"\\\\[a-zA-Z]", math):
            found.append(f"a command with two backslashes: {math}")
        if len(re.findall(r"\\left(?![a-z])", math)) != len(re.findall(r"\\right(?![a-z])", math)):
            found.append(f"\\left without \\right: {math}")
    return found


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("$x \times y$", "the control character '\\t'"),
        ("$\x0crac12$", "the control character '\\x0c'"),
        (r"$a + \\sum_i b_i$", r"a command with two backslashes: a + \\sum_i b_i"),
        (r"$a + b, and `$c$`", "a $ without its other"),
        ("$$a$$ and $$b", "a $ without its other"),
        (r"$\frac{a}{b$", r"braces that do not close: \frac{a}{b"),
        (r"$\left(a\leftarrow b$", r"\left without \right: \left(a\leftarrow b"),
    ],
)
def test_what_is_a_fault(text: str, fault: str) -> None:
    assert faults(text) == [fault]


@pytest.mark.parametrize("text", ["plain", r"$\left(\frac{a}{b}\right)$ and $$\{x\}$$", "`echo $HOME`", "$a \\\\\nb$"])
def test_what_is_none(text: str) -> None:
    assert faults(text) == []


def test_docstrings_have_no_faults() -> None:
    found, math = [], 0
    for path in FILES:
        for line, eats, text in docstrings(path.read_text(encoding="utf-8")):
            math += len(MATH.findall(CODE.sub("", text)))
            where = f"{path.relative_to(PACKAGE.parent)}:{line}"
            found += [f"{where}: backslashes, and no r before the quotes"] if eats else []
            found += [f"{where}: {fault}" for fault in faults(text)]
    assert found == []
    assert math > 100  # it looks where the mathematics is
