"""Every script and configuration under examples/ runs, and does what it says."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

import nestopt
from nestopt import cli
from nestopt.train.report import metrics

EXAMPLES = Path(__file__).parents[2] / "examples"


def printed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What the script prints when it is run in an empty folder."""
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


def test_there_is_a_test_for_every_example() -> None:
    tested = {"swap_optimizer.py", "compose.py", "stack.yaml", "layer.py", "own_text.yaml"}
    tested |= {"huggingface.py", "lightning_module.py"}  # in test_recipes.py
    tested |= {"harness.py"}  # in tests/models/test_hf_tools.py
    tested |= {"stack_smollm.py"}  # in test_pretrained.py
    tested |= {"hope.yaml"}  # in tests/benchmarks/test_hope.py
    tested |= {"hope_counts.yaml"}  # in tests/evidence/test_claims.py
    assert {path.name for path in EXAMPLES.iterdir() if path.is_file()} == tested


def test_swap_optimizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = printed("swap_optimizer.py", tmp_path, monkeypatch, capsys)
    theirs, ours, muon = (float(number) for number in re.findall(r"(?:AdamW|rest) (\d\.\d+)", out))
    assert theirs == ours
    assert max(theirs, muon) < 0.05  # from log 10 = 2.3
    assert "4.weight   10×64  adamw  0.003  1       the last linear layer, taken for the output" in out


def test_compose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = printed("compose.py", tmp_path, monkeypatch, capsys)
    assert "the YAML file holds the same stack: True" in out
    assert "4 memories on 4 levels" in out
    losses = [float(loss) for loss in re.findall(r"loss (\d\.\d+)", out)]
    assert len(losses) == 3
    assert losses[-1] < 0.1 * losses[0]
    assert "parallel.slow.inner.momentum" in out


def test_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = printed("layer.py", tmp_path, monkeypatch, capsys)
    (right,) = re.findall(r"right on (\d+)%", out)
    assert int(right) > 50
    (apart,) = re.findall(r"differs by at most (\S+)", out)
    assert float(apart) < 1e-5


def test_own_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(
        "She sells sea shells by the sea shore, and the shells she sells are sea shells.\n" * 100
    )
    arguments = ["train", str(EXAMPLES / "own_text.yaml"), "--data", "text.txt", "-q"]
    arguments += [
        "train.steps=12",
        "train.eval_every=0",
        "train.final_bytes=256",
        "data.window=32",
        "train.log_every=1",
    ]
    assert cli.main([*arguments, "train.sample_bytes=0"]) == 0
    losses = [record["train/loss"] for record in metrics.read("runs/001/metrics.jsonl") if "train/loss" in record]
    assert losses[-1] < losses[0] - 1
    assert cli.main(["describe", "runs/001"]) == 0
    assert "every 8 steps" in capsys.readouterr().out
    assert isinstance(nestopt.load(EXAMPLES / "own_text.yaml"), nestopt.Config)
