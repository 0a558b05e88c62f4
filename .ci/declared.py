"""Run tests on the oldest that pyproject.toml declares (core to layers), and on the newest (core and configurations).

Oldest: the oldest Python, with the oldest torch and the oldest release of everything else that is declared with one.
Newest: the newest Python, with the versions of constraints.txt. Each has a virtual environment, deleted at the end.
Needs Python 3.11 or newer, and those two: as `python3.X` on the PATH, or among pyenv's.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tomllib

ROOT = Path(__file__).parent.parent

NEWEST = ["core", "config", "kernels", "ops", "plugins", "test_cli.py", "test_import.py"]
"""Of the newest Python: its other versions are those with which all tests run."""

TESTS = [*NEWEST, "levels", "optim", "nn", "train/checkpoints/test_file.py", "train/report/test_plots.py"]
LEFT_OUT = ["deep", "self_modifying", "matrix"]
"""Rooms of levels: these take most of the time, on closed forms beside their twins, which the layers of nn run, too."""


def declared() -> tuple[list[str], list[str]]:
    """The Pythons of the classifiers, oldest first, and what the package, its training and its tests need."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = (re.fullmatch(r"Programming Language :: Python :: (3\.\d+)", line) for line in project["classifiers"])
    extras = project["optional-dependencies"]
    needs = [*project["dependencies"], *extras["train"], *extras["test"]]
    return [match[1] for match in found if match], [need for need in needs if not need.startswith("nestopt[")]


def oldest(needs: list[str], given: list[str]) -> list[str]:
    """Constraints: the oldest declared release of what is needed, and the `given` ones for what that needs in turn."""
    floors = dict(need.split(">=") for need in needs)
    # an old torch needs an old setuptools, and an old pydantic its own core: pip knows which
    chosen = {normal(name) for name in (*floors, "setuptools", "pydantic-core")}
    others = [line for line in given if normal(line.split("==")[0]) not in chosen]
    return [*(f"{name}=={version}" for name, version in floors.items()), *others]


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).strip().lower()


def interpreter(python: str) -> str:
    """The path of a Python of this version."""
    paths = [f"python{python}"]
    if shutil.which("pyenv"):
        versions = [v for v in answer("pyenv", "versions", "--bare").split() if v.startswith(f"{python}.")]
        paths += [f"{answer('pyenv', 'prefix', version)}/bin/python{python}" for version in versions]
    # each is asked: pyenv puts a python3.X on the PATH that does not run while another version is chosen
    ask = "import sys; print('%d.%d' % sys.version_info[:2])"
    for path in paths:
        if shutil.which(path) and answer(path, "-c", ask) == python:
            return path
    sys.exit(
        f"Python {python}, which pyproject.toml declares, is not here: put a python{python} on the PATH, or install it "
        f"by `pyenv install {python}`"
    )


def answer(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def pip(folder: Path, *what: str) -> None:
    done = subprocess.run([folder / "bin/pip", "install", "-q", *what], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"pip install {' '.join(what)}\n{done.stdout}{done.stderr}")


def install(path: str, folder: Path, constraints: list[str], needs: list[str]) -> None:
    """Make an environment with what nestopt needs, but without itself: that writes to the checkout."""
    subprocess.run([path, "-m", "venv", folder], check=True)
    (folder / "constraints.txt").write_text("\n".join(constraints))
    pip(folder, "-c", f"{folder}/constraints.txt", *needs)


def test(folder: Path, names: list[str]) -> None:
    own = folder / "bin/python"
    shown = "import sys, torch; print(f'\\nPython {sys.version.split()[0]}, torch {torch.__version__}')"
    subprocess.run([own, "-c", shown], check=True)
    ignored = [f"--ignore=tests/levels/{name}" for name in LEFT_OUT]
    tests = [f"tests/{name}" for name in names]
    if subprocess.run([own, "-m", "pytest", "-q", "-x", *ignored, *tests], cwd=ROOT, check=False).returncode:
        sys.exit(f"tests fail on Python {folder.name} with the versions named in {Path(__file__).name}")


def main() -> None:
    start = time.monotonic()
    pythons, needs = declared()
    given = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    cases = {pythons[0]: oldest(needs, given), pythons[-1]: given}
    paths = {python: interpreter(python) for python in cases}
    with tempfile.TemporaryDirectory() as within:
        folders = {python: Path(within, python) for python in cases}
        with ThreadPoolExecutor() as pool:
            work = [pool.submit(install, paths[p], folders[p], cases[p], needs) for p in cases]
        for done in work:
            done.result()
        for folder in folders.values():
            pip(folder, "--no-deps", "-e", str(ROOT))
        print(f"installed after {time.monotonic() - start:.0f} s", flush=True)
        test(folders[pythons[0]], TESTS)
        test(folders[pythons[-1]], NEWEST)
    print(f"both passed after {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
