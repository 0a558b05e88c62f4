"""Small programs after public bug reports of other libraries, each named in its first lines: right here, to stay so.

A program looks at its kind with several levels, dtypes or engines, says what is wrong, and ends with exit code 1 then.
Most run within the test's own process; what starts others, or keeps state of a library, has one of its own.
"""

from __future__ import annotations

import ast
import os
import runpy
import subprocess
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import nestopt

PROGRAMS = sorted((Path(__file__).parent / "programs").glob("*.py"))

DISTRIBUTED = {"40_ddp_unused_none", "41_fsdp2_by_hand", "55_deepspeed_frozen_tied"}
APART = {"47_plugins_broken", "54_accelerate_roundtrip"}
"""They start interpreters, or leave a library's state behind."""
SLOW = APART | {"01_state_dtype_on_load", "15_shampoo_bad_gradient", "21_strides", "45_recompile_with_schedule"}


def missing(path: Path) -> list[str]:
    """The packages a program imports that are not installed here."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names.add(node.module.partition(".")[0])
    return sorted(name for name in names if find_spec(name) is None)


def marks(name: str) -> list[Any]:
    found: list[Any] = []
    if name in DISTRIBUTED:
        found.append(pytest.mark.distributed)
    if name in SLOW:
        found.append(pytest.mark.slow)
    return found


@pytest.mark.parametrize("path", [pytest.param(path, id=path.stem, marks=marks(path.stem)) for path in PROGRAMS])
def test_a_program_finds_nothing_wrong(path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    if absent := missing(path):
        pytest.skip(f"needs {', '.join(absent)}")
    if path.stem in DISTRIBUTED | APART:
        root = str(Path(nestopt.__file__).parents[1])
        there = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": root + os.pathsep + os.environ.get("PYTHONPATH", ""),
        }
        ended = subprocess.run(
            [sys.executable, path], env=there, capture_output=True, text=True, check=False, timeout=600
        )
        code, said = ended.returncode, ended.stdout + ended.stderr
    else:
        warnings.simplefilter("ignore")  # a stranger's program; pytest puts them back
        with pytest.raises(SystemExit) as exit_:
            runpy.run_path(str(path), run_name="__main__")
        code, said = exit_.value.code, capfd.readouterr().out
    assert not code, said


def test_every_program_says_what_it_is_after_and_is_known() -> None:
    names = {path.stem for path in PROGRAMS}
    assert len(names) >= 30
    assert names >= {*DISTRIBUTED, *SLOW}
    for path in PROGRAMS:
        assert path.read_text(encoding="utf-8").startswith('"""')
