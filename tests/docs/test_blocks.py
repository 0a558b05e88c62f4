"""Every block of code of every page is complete: copied into an empty file, it runs, and prints what the page says."""

from __future__ import annotations

import ast
import builtins
import doctest
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts)]
BLOCK = re.compile(
    r"^```(\{testcode\}|\{doctest\}|python)\n(.*?)^```$(?:\s*^```\{testoutput\}\n(.*?)^```$)?", re.MULTILINE | re.DOTALL
)
NOT_HERE = {
    'name = "…"  # a GPT-2': "a model from the hub",
    'Run.open("runs/001")': "a run that the page has made before",
    "examples/scale/340m.yaml": "a file of the repository, and a dataset from the hub",
    "nestopt.train.deepspeed import": "several processes and DeepSpeed",
    "fully_shard": "several processes",
    'precision="bfloat16").cuda()': "a GPU",
    'from_pretrained("hope")': "a folder that the block before it makes",
}
"""Words by which a block is known that needs more than a file, and what that is. Its names are looked at as well."""

BLOCKS = {
    f"{page.relative_to(ROOT).with_suffix('')}:{page_text[: found.start()].count(chr(10)) + 2}": found.groups()
    for page in PAGES
    for page_text in [page.read_text(encoding="utf-8")]
    for found in BLOCK.finditer(page_text)
}


def source_of(kind: str, block: str) -> str:
    examples = doctest.DocTestParser().get_examples(block) if kind == "{doctest}" else []
    return "".join(example.source for example in examples) or block


def unknown(source: str) -> Iterator[str]:
    """Names that a program reads and nowhere binds."""
    known = set(dir(builtins))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            known.update((alias.asname or alias.name).partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.FunctionDef | ast.ClassDef | ast.ExceptHandler):
            known.add(node.name or "")
        elif isinstance(node, ast.arg):
            known.add(node.arg)
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            known.add(node.id)
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Name) and node.id not in known:
            yield node.id


@pytest.mark.parametrize(
    ("source", "names"),
    [("import torch\ntorch.ones(x)", ["x"]), ("for x in y: print(x)", ["y"]), ("def f(a): return a + b", ["b"])],
)
def test_what_is_unknown(source: str, names: list[str]) -> None:
    assert list(unknown(source)) == names


@pytest.mark.parametrize("where", BLOCKS)
def test_a_block_has_all_its_imports(where: str) -> None:
    kind, block, _ = BLOCKS[where]
    assert sorted(set(unknown(source_of(kind, block)))) == []


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted({where.rpartition(":")[0] for where in BLOCKS}))
def test_blocks_run_as_copied_into_an_empty_file(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for where, (kind, block, output) in BLOCKS.items():
        if not where.startswith(f"{page}:") or any(words in block for words in NOT_HERE):
            continue
        torch.manual_seed(0)
        names = {"__name__": "__main__"}
        capsys.readouterr()
        if kind == "{doctest}":
            test = doctest.DocTestParser().get_doctest(block, names, where, where, 0)
            failed, _ = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test)
            assert not failed, capsys.readouterr().out
        else:
            exec(compile(block, where, "exec", dont_inherit=True), names)
            if output is not None:
                printed = capsys.readouterr().out
                assert doctest.OutputChecker().check_output(output, printed, doctest.ELLIPSIS), f"{where}: {printed}"


def test_what_is_not_run_is_still_there() -> None:
    for words in NOT_HERE:
        assert any(words in block for _, block, _ in BLOCKS.values()), words
