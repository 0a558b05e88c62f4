"""A plugin of ten lines, installed with pip into a folder of its own, used by a process that knows it by name only."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = """
[build-system]
requires = ["setuptools>=77.0.3"]
build-backend = "setuptools.build_meta"

[project]
name = "{name}"
version = "1.2"

[project.entry-points.nestopt]
{point} = "{module}"

[tool.setuptools]
py-modules = ["{module}"]
"""

TEN_LINES = """\
import torch, nestopt

class SignMomentum(nestopt.Level):
    beta: float = 0.9
    def init(self, param):
        return {"m": torch.zeros_like(param)}
    def step(self, grad, state, signal):
        m = self.beta * state["m"] + grad
        return m.sign(), {"m": m}

@nestopt.hookimpl
def nestopt_register_levels(register):
    register("sign_momentum", SignMomentum)
"""

USE = """
import torch, nestopt

level = nestopt.build("level", {"level": "sign_momentum", "beta": 0.5})

weight = torch.nn.Parameter(torch.zeros(2, 3))
optimizer = nestopt.optimizer([weight], level, lr=0.25)
for grad in (torch.ones(2, 3), -torch.ones(2, 3), -torch.ones(2, 3)):  # m = 1, -0.5, -1.25
    weight.grad = grad
    optimizer.step()
assert torch.equal(weight.detach(), torch.full((2, 3), 0.25)), weight

q, k, v = torch.randn(3, 1, 5, 1, 4, dtype=torch.float64)
y, _ = nestopt.ops.run(level, q, k, v)
m = torch.zeros(4, 4, dtype=torch.float64)
for t in range(5):
    m = 0.5 * m + torch.outer(v[0, t, 0], k[0, t, 0])
    assert torch.allclose(y[0, t, 0], m.sign() @ q[0, t, 0], rtol=0, atol=1e-12)

layer = nestopt.layer({"level": "titans", "rule": "sign_momentum", "step_size": 0.01}, dim=8, heads=2)
_, state = layer(torch.randn(1, 4, 8))
assert list(state["memory"]["level"]["rule"]["W1"]) == ["m"]
print("three roles")
"""


def write(folder: Path, name: str, point: str, code: str) -> Path:
    folder.mkdir()
    module = name.replace("-", "_")
    (folder / "pyproject.toml").write_text(PROJECT.format(name=name, point=point, module=module))
    (folder / f"{module}.py").write_text(code)
    return folder


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed a working plugin and one that fails to import."""
    root = tmp_path_factory.mktemp("plugins")
    packages = [
        write(root / "works", "sign-momentum", "sign", TEN_LINES),
        write(root / "fails", "broken-level", "broken", "raise RuntimeError('no such device')\n"),
    ]
    # torch brings the setuptools that builds them: nothing is downloaded
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "-q"]
    command += ["--disable-pip-version-check", "--target", str(root / "site"), *map(str, packages)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return root / "site"


def run(site: Path, *args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A Python process that finds `site`."""
    env = {key: value for key, value in os.environ.items() if key != "NESTOPT_DISABLE_PLUGINS"}
    paths = os.pathsep.join(filter(None, (str(site), env.get("PYTHONPATH", ""))))
    env |= {"PYTHONPATH": paths, **environment}
    return subprocess.run([sys.executable, *args], check=False, capture_output=True, text=True, env=env)


def test_ten_lines_are_an_optimizer_a_layer_and_a_rule(site: Path) -> None:
    done = run(site, "-c", USE)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "three roles\n"
    assert "plugin 'broken' (broken-level 1.2) is skipped" in done.stderr


def test_the_command_line_lists_it_and_names_the_broken_one(site: Path) -> None:
    listed = run(site, "-m", "nestopt", "plugins")
    assert "sign (sign-momentum 1.2): level sign_momentum" in listed.stdout
    assert "broken (broken-level 1.2): SKIPPED: import failed: RuntimeError: no such device" in listed.stdout
    assert listed.returncode == 1  # a script can tell that something is broken
    (line,) = [line for line in run(site, "-m", "nestopt", "levels").stdout.splitlines() if "sign_momentum" in line]
    assert line.endswith("[plugin sign]")


def test_p_switches_them_off_by_name(site: Path) -> None:
    levels = run(site, "-m", "nestopt", "-p", "no:sign", "-p", "no:broken", "levels")
    assert "sign_momentum" not in levels.stdout
    assert "momentum" in levels.stdout
    assert (levels.returncode, levels.stderr) == (0, "")  # what is switched off is not even imported


def test_the_environment_switches_all_of_them_off(site: Path) -> None:
    done = run(site, "-c", USE, NESTOPT_DISABLE_PLUGINS="1")
    assert done.returncode != 0
    assert "no level is called 'sign_momentum'" in done.stderr
    assert "skipped" not in done.stderr
