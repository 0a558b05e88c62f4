"""A checkout that is not installed: nothing asks pip for what it does not know then."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import nestopt

ROOT = Path(nestopt.__file__).parents[1]

ASK = """
import importlib.metadata
try:
    importlib.metadata.version("nestopt")
except importlib.metadata.PackageNotFoundError:
    print("not installed")
import nestopt
from nestopt import doctor
print(nestopt.__file__, nestopt.__version__)
print([plugin.name for plugin in nestopt.registry.plugins() if plugin.error])
print(*doctor.report())
"""


@pytest.fixture
def bare(tmp_path: Path) -> dict[str, str]:
    """An environment with all that is installed here but nestopt and its plugins, and with a copy of nestopt."""
    site = tmp_path / "site"
    site.mkdir()
    for folder in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(folder).iterdir():
            if "nestopt" not in entry.name and not (site / entry.name).exists():
                (site / entry.name).symlink_to(entry)
    shutil.copytree(ROOT / "nestopt", tmp_path / "copy" / "nestopt", ignore=shutil.ignore_patterns("__pycache__"))
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "copy"), str(site)])}


def test_a_checkout_that_is_not_installed_works_and_knows_its_version(bare: dict[str, str], tmp_path: Path) -> None:
    # -S: the environment's own site-packages, where nestopt is installed, are not looked into
    command = [sys.executable, "-S", "-c", ASK]
    done = subprocess.run(command, cwd=tmp_path, env=bare, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    first, where, plugins, *rest = done.stdout.splitlines()
    assert first == "not installed"
    assert where == f"{tmp_path / 'copy' / 'nestopt' / '__init__.py'} {nestopt.__version__}"
    assert plugins == "[]"
    assert rest[0].startswith(f"nestopt {nestopt.__version__} (a checkout that is not installed), Python")
    assert rest[-1] == "all well True"
