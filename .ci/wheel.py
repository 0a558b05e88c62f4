"""Install the wheel into an empty environment, and run there what README.md shows: each Python block as a file.

    python .ci/wheel.py FOLDER    # that holds the wheel

The environment has the wheel and what its metadata asks for without an extra, in turn, and nothing else: these are
links to where they are installed here, so that nothing is downloaded. It is deleted at the end.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import venv
import zipfile
from collections.abc import Iterable
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
COMMANDS = (["plugins"], ["levels", "*momentum*"], ["describe", "titans"])
"""What works without an extra."""


def needed(requires: Iterable[str], found: dict[str, Distribution]) -> dict[str, Distribution]:
    """Return the distributions that requirements ask for without an extra, and these in turn, by name."""
    for need in map(Requirement, requires):
        name = canonicalize_name(need.name)
        if name in found or (need.marker is not None and not need.marker.evaluate({"extra": ""})):
            continue
        found[name] = distribution(name)
        needed(found[name].requires or (), found)
    return found


def link(site: Path, dist: Distribution) -> None:
    """Link what a distribution has at the top of its site-packages into another."""
    for name in {file.parts[0] for file in dist.files or () if file.parts[0] not in ("..", "__pycache__")}:
        if not (site / name).exists():
            (site / name).symlink_to(Path(str(dist.locate_file(name))).resolve())


def main(dist: Path) -> int:
    """Return how many blocks and commands fail."""
    (wheel,) = dist.glob("nestopt-*.whl")
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) > 4, "README.md has lost its Python blocks"
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        venv.create(f"{folder}/venv")
        python, place = f"{folder}/venv/bin/python", Path(folder, "empty")
        place.mkdir()
        (site,) = Path(folder, "venv/lib").glob("python*/site-packages")
        with zipfile.ZipFile(wheel) as file:
            file.extractall(site)
        (info,) = site.glob("nestopt-*.dist-info")
        dependencies = needed(Distribution.at(info).requires or (), {})
        for dist in dependencies.values():
            link(site, dist)
        print(f"{wheel.name} with {', '.join(sorted(dependencies))}")
        where = "import nestopt, sys; sys.exit(not nestopt.__file__.startswith(sys.prefix))"
        tried = [("the wheel is what is imported", ["-c", where])]
        for i, block in enumerate(blocks, start=1):
            (place / f"block_{i}.py").write_text(block)
            tried.append((f"README.md, Python block {i}", [f"block_{i}.py"]))
        tried += [(" ".join(["nestopt", *command]), ["-m", "nestopt", *command]) for command in COMMANDS]
        for what, command in tried:
            done = subprocess.run([python, "-I", *command], cwd=place, capture_output=True, text=True, check=False)
            print(f"{what}: {'fails' if done.returncode else 'runs'}", flush=True)
            if done.returncode:
                failed += 1
                print(done.stdout + done.stderr, file=sys.stderr)
    return failed


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
