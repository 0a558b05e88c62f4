"""What a type checker finds of the functions that people call first."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import nestopt
from nestopt import Config, ConfigError, Level

REVEALED = {
    'nestopt.layer("titans", dim=8)': "nestopt.nn.sequence_memory.SequenceMemory",
    "nestopt.layer(nestopt.levels.titans(), dim=8)": "nestopt.nn.sequence_memory.SequenceMemory",
    'nestopt.layer("cms", dim=8)': "nestopt.nn.cms.CMS",
    "nestopt.layer(nestopt.levels.cms(), dim=8)": "nestopt.nn.cms.CMS",
    "nestopt.nn.layer(nestopt.levels.cms(), dim=8)": "nestopt.nn.cms.CMS",
    "nestopt.nn.layer(nestopt.levels.adam(), dim=8)": "nestopt.nn.sequence_memory.SequenceMemory",
    'nestopt.load("run.yaml")': "nestopt.config.schema.Config | nestopt.core.level.Level",
    'nestopt.load("run.yaml", kind=nestopt.Config)': "nestopt.config.schema.Config",
    'nestopt.load("run.yaml", kind=nestopt.Level)': "nestopt.core.level.Level",
    'nestopt.build("level", "adam")': "nestopt.core.level.Level",
    'nestopt.build("level", nestopt.levels.adam())': "nestopt.levels.gradient.adam.Adam",
    'nestopt.build("level", nestopt.levels.adam)': "nestopt.levels.gradient.adam.Adam",
    'nestopt.build("memory", "mlp")': "nestopt.core.memories.Memory",
    'nestopt.build("retention", {"retention": "decay"})': "nestopt.core.retentions.Retention",
    "nestopt.optimizer([], nestopt.levels.adam())": "nestopt.optim.optimizer.Nested",
    "nestopt.model()": "nestopt.models.hope.HopeLM",
    "nestopt.chain(nestopt.levels.adam())": "nestopt.core.compose.Chain",
}


@pytest.mark.slow
def test_what_is_returned_has_a_precise_type(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    file = tmp_path / "use.py"
    file.write_text("import nestopt\n" + "".join(f"reveal_type({call})\n" for call in REVEALED))
    root = Path(nestopt.__file__).parents[1]
    command = [sys.executable, "-m", "mypy", "--config-file", str(root / "pyproject.toml"), str(file)]
    env = {**os.environ, "MYPYPATH": str(root)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=env)
    found = re.findall(r'note: Revealed type is "(.*)"', done.stdout)
    assert dict(zip(REVEALED, found, strict=True)) == REVEALED, done.stdout
    assert "error" not in done.stdout


def test_load_refuses_another_kind_in_words(tmp_path: Path) -> None:
    stack, config = tmp_path / "stack.yaml", tmp_path / "run.yaml"
    stack.write_text("[momentum, newton_schulz]")
    config.write_text("model: {dim: 16}")
    assert nestopt.load(config, ["model.heads=2"], kind=Config).model.heads == 2
    assert nestopt.load(stack, kind=Level) == nestopt.load(stack)
    with pytest.raises(ConfigError, match=r"stack.yaml: it is a stack \(chain\); give a Config"):
        nestopt.load(stack, kind=Config)
    with pytest.raises(ConfigError, match=r"run.yaml: it is a configuration; give a Level"):
        nestopt.load(config, kind=Level)
