"""The kit: a package of each kind is written, installed by its metadata, and its own tests and checks are run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nestopt.cli import main
from nestopt.core.registry import KINDS
from nestopt.plugins import templates

NAMES = {kind: f"my_{kind}" for kind in templates.KINDS}


def install(package: Path, site: Path, requires: str = "") -> None:
    """Do what pip does with a module: the file, and the metadata that name its entry point."""
    (module,) = package.glob("nestopt_*.py")
    name, version = module.stem.removeprefix("nestopt_"), "0.1.0"
    (site / module.name).write_text(module.read_text())
    info = site / f"{module.stem}-{version}.dist-info"
    info.mkdir()
    needs = f"Requires-Dist: {requires}\n" if requires else ""
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package.name}\nVersion: {version}\n{needs}")
    (info / "entry_points.txt").write_text(f"[nestopt]\n{name} = {module.stem}\n")


def run(site: Path, *command: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(filter(None, (str(site), os.environ.get("PYTHONPATH", ""))))
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], check=False, capture_output=True, text=True, env=env)


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packages")
    (out / "site").mkdir()
    for kind, name in NAMES.items():
        assert main(["plugins", "new", name, "--kind", kind, "--out", str(out)]) == 0
        install(out / f"nestopt-{name.replace('_', '-')}", out / "site")
    return out


def test_there_is_a_template_for_every_hook() -> None:
    for kind, hooks in templates.HOOKS.items():
        assert hooks[0] == KINDS[kind][1]
    assert templates.HOOKS.keys() == KINDS.keys()


@pytest.mark.slow
def test_the_tests_of_every_package_pass(packages: Path) -> None:
    """In one process for all, as installed: none is skipped."""
    tests = [str(path) for path in packages.glob("nestopt-*/tests/test_*.py")]
    assert len(tests) == len(NAMES)
    options = [
        "-q",
        "-c",
        os.devnull,
        "--rootdir",
        str(packages),
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-W",
        "error",
    ]
    done = run(packages / "site", "-m", "pytest", *options, *tests)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout
    assert "skipped" not in done.stdout


def test_one_that_is_not_installed_runs_its_tests_too(packages: Path, tmp_path: Path) -> None:
    package = packages / "nestopt-my-schedule"
    (package / "pyproject.toml").read_text()
    done = run(
        tmp_path, "-m", "pytest", "-q", "--rootdir", str(package), "-c", str(package / "pyproject.toml"), str(package)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 passed, 1 skipped" in done.stdout


@pytest.mark.slow
def test_each_passes_the_check_and_is_listed_with_its_hook(packages: Path) -> None:
    for names in (
        ["my_level", "nestopt-my-token-form", "my_command", "my_model", "my_memory", "my_logger", "my_task"],
    ):
        code = (
            f"import sys; from nestopt.cli import main; sys.exit(sum(main(['plugins', 'check', n]) for n in {names}))"
        )
        done = run(packages / "site", "-c", code)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count(": passed") == len(names), done.stdout
        assert "token_form my_token_form: passed (on linear_attention)" in done.stdout
        assert "model my-model: passed (1" in done.stdout
    listed = run(packages / "site", "-m", "nestopt", "plugins", "--json")
    plugins = {plugin["name"]: plugin for plugin in json.loads(listed.stdout)}
    for kind, name in NAMES.items():
        (provided,) = plugins[name]["provides"]
        assert (provided["kind"], provided["hook"]) == (kind, KINDS[kind][1])
        assert (plugins[name]["version"], plugins[name]["error"]) == ("0.1.0", None)
    assert f"level my_level [{KINDS['level'][1]}]" in run(packages / "site", "-m", "nestopt", "plugins").stdout


BAD_LEVEL = """
import nestopt, torch

class Leaky(nestopt.Level):
    def init(self, param):
        return {"m": torch.zeros_like(param)}
    def step(self, grad, state, signal):
        state["m"].add_(grad)  # in place, which is not allowed
        return state["m"], state

@nestopt.hookimpl
def nestopt_register_levels(register):
    register("leaky", Leaky)
"""

SLOW = "import time; time.sleep(1.2)\n"


def write(folder: Path, name: str, code: str, requires: str, site: Path) -> None:
    package = folder / f"nestopt-{name}"
    package.mkdir()
    (package / f"nestopt_{name}.py").write_text(code)
    install(package, site, requires)


def test_what_is_wrong_with_plugins_is_said(tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    write(tmp_path, "leaky", SLOW + BAD_LEVEL, "nestopt>=0.0.1", site)
    write(tmp_path, "newer", "raise SystemExit('imported')", "nestopt[train]>=99,<100", site)
    write(tmp_path, "other", BAD_LEVEL.replace("leaky", "other"), 'nestopt>=99; python_version < "3"', site)
    write(
        tmp_path,
        "broken",
        "import nestopt\n\ndef deep():\n    raise ZeroDivisionError('of mine')\n\ndeep()\n",
        "",
        site,
    )
    code = "import sys, json; from nestopt.cli import main; print(*(main(line.split()) for line in sys.argv[1:]))"
    checks = [f"plugins check {name}" for name in ("nestopt-leaky", "newer", "nope")]
    done = run(site, "-W", "ignore", "-c", code, "plugins", *checks, "doctor")
    lines = {line.split()[0]: line for line in reversed(done.stdout.splitlines())}
    assert "SKIPPED: it needs nestopt<100,>=99, and nestopt 0.1.0 is installed; install another" in lines["newer"]
    assert "SLOW: its import takes 1." in lines["leaky"]
    assert "SLOW" not in lines["other"]
    assert "level other [nestopt_register_levels]" in lines["other"]
    assert "in deep" not in done.stdout
    assert "level leaky: FAILED: leaky (plugin 'leaky'): step changes the state's 'm' in place" in done.stdout
    assert "newer (nestopt-newer 0.1.0):\n  FAILED: it needs nestopt" in done.stdout
    assert done.stdout.endswith("\n1 1 1 2 1\n")
    assert "no plugin is called 'nope', or comes from a package of that name" in done.stderr
    assert "plugin leaky (nestopt-leaky 0.1.0) is SLOW: its import takes 1." in done.stdout

    done = run(site, "-W", "ignore", "-c", code, "plugins --errors", "plugins --json")
    errors, _, data = done.stdout.partition("\n[\n")
    assert "in deep" in errors
    assert "ZeroDivisionError: of mine" in errors.splitlines()[-1]
    found = json.loads(f"[{data.rpartition(']')[0]}]")
    assert "in deep" in next(plugin["traceback"] for plugin in found if plugin["name"] == "broken")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["adam"], "the level 'adam' is there already (plugin 'nestopt')"),
        (["9lives"], "'9lives' is not allowed; give letters"),
        (["a/b"], "'a/b' is not allowed"),
        (["class"], "'class' is not allowed"),
        (["fine", "--out", "nowhere"], "--out: 'nowhere' is not allowed; give a folder that is there"),
        (["there"], "nestopt-there is there already; remove it, or give another name"),
    ],
)
def test_names_that_cannot_be_are_refused_and_nothing_is_written(args, words, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nestopt-there").mkdir()
    assert main(["plugins", "new", *args]) == 2
    assert words in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["nestopt-there"]
    assert not list((tmp_path / "nestopt-there").iterdir())
