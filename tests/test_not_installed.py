"""What is not installed: nestopt itself, in a checkout, and the extra `train`."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import nestopt

ROOT = Path(nestopt.__file__).parents[1]

Run = Callable[..., "subprocess.CompletedProcess[str]"]

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


def bare(tmp_path: Path, without: tuple[str, ...] = ()) -> Run:
    """Runs Python with all that is installed here but nestopt, its plugins and the packages `without`."""
    site = tmp_path / "site"
    site.mkdir()
    for folder in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(folder).iterdir():
            absent = "nestopt" in entry.name or entry.name.partition("-")[0] in without
            if not absent and not (site / entry.name).exists():
                (site / entry.name).symlink_to(entry)
    shutil.copytree(ROOT / "nestopt", tmp_path / "copy" / "nestopt", ignore=shutil.ignore_patterns("__pycache__"))
    paths = os.pathsep.join([str(tmp_path / "copy"), str(site)])

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        # -S: the environment's own site-packages, where nestopt is installed, are not looked into
        command = [sys.executable, "-S", *arguments]
        environment = {**os.environ, "PYTHONPATH": paths}
        return subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True, check=False)

    return run


def test_a_checkout_that_is_not_installed_works_and_knows_its_version(tmp_path: Path) -> None:
    done = bare(tmp_path)("-c", ASK)
    assert done.returncode == 0, done.stderr
    first, where, plugins, *rest = done.stdout.splitlines()
    assert first == "not installed"
    assert where == f"{tmp_path / 'copy' / 'nestopt' / '__init__.py'} {nestopt.__version__}"
    assert plugins == "[]"
    assert rest[0].startswith(f"nestopt {nestopt.__version__} (a checkout that is not installed), Python")
    assert rest[-1] == "all well True"


USE = """
import torch, nestopt
from nestopt import optim, testing
model = nestopt.model({"dim": 16, "blocks": 1, "heads": 2})
optimizer = nestopt.optimizer(model, "muon", rest="adamw")
logits, _ = model(torch.zeros(1, 8, dtype=torch.long))
logits.sum().backward()
optimizer.step()
y, _ = nestopt.layer("titans", dim=8, heads=2)(torch.zeros(1, 5, 8))
config = nestopt.load("run.yaml")
print(nestopt.describe(config))
from nestopt.train.data import Dataset
assert isinstance(config.data.dataset, Dataset)
print(config.data.dataset.load().name)
"""

COMMANDS = """
import contextlib, io, json
from nestopt.cli import main
for command in ("levels muon", "plugins", "describe run.yaml", "describe run",
                "train", "generate run", "eval forgetting run", "evidence parity", "plan", "plan --gpus 2"):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(command.split())
    print(json.dumps([command, code, out.getvalue(), err.getvalue()]))
"""
EXTRA = ("matplotlib", "safetensors", "tqdm")
NEED_IT = ("loop", "generation", "planning", "planning.periods", "deepspeed", "report.plots", "checkpoints.file")


def sentence(text: str) -> bool:
    return re.fullmatch(rf"({'|'.join(EXTRA)}) is not installed; pip install 'nestopt\[train\]'", text) is not None


def test_without_the_extra_all_but_training_and_plots_works_and_these_name_it(tmp_path: Path) -> None:
    run = bare(tmp_path, without=(*EXTRA, "rich", "argcomplete"))
    (tmp_path / "run.yaml").write_text("model: {dim: 16, blocks: 1, heads: 2}\n")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("model: {dim: 16, blocks: 1, heads: 2}\n")
    done = run("-W", "error", "-c", USE)
    assert done.returncode == 0, done.stderr
    assert "standard library" in done.stdout.splitlines()[-1]

    modules = [*(f"nestopt.train.{name}" for name in NEED_IT), "nestopt.evidence"]
    found = run("-c", "\n".join(f"try: import {name}\nexcept ImportError as error: print(error)" for name in modules))
    assert len(found.stdout.splitlines()) == len(modules)
    assert all(sentence(line) for line in found.stdout.splitlines()), found.stdout

    done = run("-c", COMMANDS)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    for command, code, out, err in answers[:4]:
        assert (code, err) == (0, ""), command
        assert out, command
    for command, code, out, err in answers[4:]:
        assert (code, out) == (2, ""), command
        assert sentence(err.removeprefix("nestopt: ").removesuffix("\n")), command
    doctor = run("-m", "nestopt", "doctor")
    assert doctor.returncode == 0
    assert "matplotlib not installed (for training and plots: pip install 'nestopt[train]')" in doctor.stdout
