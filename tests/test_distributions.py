"""What the wheel and the source distribution hold, built from a copy of the checkout."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

import nestopt

ROOT = Path(nestopt.__file__).parents[1]
FOLDERS = (".ci", "benchmarks", "docs", "examples", "plugins", "tests")
FILES = ("CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "README.md", "ROADMAP.md", "SECURITY.md")
FILES += ("constraints.txt", "conftest.py", "pyproject.toml", "MANIFEST.in")
MADE = shutil.ignore_patterns(
    "__pycache__", ".*cache", ".hypothesis", "*.egg-info", "build", "dist", "_build", "api", "made", "runs", ".DS_Store"
)
BUILD = "import sys; from setuptools import build_meta as b; to = sys.argv[1]; b.build_sdist(to); b.build_wheel(to)"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """The copy, the source distribution and the wheel."""
    root = tmp_path_factory.mktemp("distributions")
    for folder in (*FOLDERS, "nestopt"):
        ignored = shutil.ignore_patterns("__pycache__") if folder == "nestopt" else MADE
        shutil.copytree(ROOT / folder, root / "copy" / folder, ignore=ignored)
    for file in FILES:
        shutil.copy(ROOT / file, root / "copy")
    (root / "dist").mkdir()
    command = [sys.executable, "-c", BUILD, str(root / "dist")]
    done = subprocess.run(command, cwd=root / "copy", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (source,), (wheel,) = (list((root / "dist").glob(pattern)) for pattern in ("*.tar.gz", "*.whl"))
    return root / "copy", source, wheel


def inside(root: Path, *folders: str) -> set[str]:
    return {str(path.relative_to(root)) for folder in folders for path in (root / folder).rglob("*") if path.is_file()}


def test_the_source_distribution_has_all_that_the_checkout_has(built: tuple[Path, Path, Path]) -> None:
    root, source, _ = built
    with tarfile.open(source) as file:
        found = {name.partition("/")[2] for name in file.getnames() if not name.endswith("/")}
    wanted = inside(root, *FOLDERS, "nestopt") | set(FILES)
    wanted = {name for name in wanted if "egg-info" not in name and "/build/" not in name}
    assert wanted - found == set()
    extra = {name for name in found - wanted if "." in Path(name).name and "egg-info" not in name}
    assert extra <= {"PKG-INFO", "setup.cfg"} | set(FOLDERS)


def test_the_wheel_has_the_package_and_nothing_else(built: tuple[Path, Path, Path]) -> None:
    root, _, wheel = built
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        info = next(name.partition("/")[0] for name in names if ".dist-info/" in name)
        metadata = message_from_string(file.read(f"{info}/METADATA").decode())
        points = file.read(f"{info}/entry_points.txt").decode()
    assert {name for name in names if ".dist-info/" not in name} == inside(root, "nestopt")
    assert "nestopt/py.typed" in names
    assert f"{info}/licenses/LICENSE" in names
    assert "nestopt = nestopt.cli:main" in points
    assert metadata["Version"] == nestopt.__version__
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert "Paper, https://arxiv.org/abs/2512.24695" in metadata.get_all("Project-URL", [])
    assert {"all", "cli", "data", "tensorboard", "train", "wandb"} <= set(metadata.get_all("Provides-Extra", []))
