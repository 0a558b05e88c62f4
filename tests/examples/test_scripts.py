"""Every script and configuration under examples/ runs, and does what it says."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

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
    tested |= {"by_name.py", "export_step.py"}
    tested |= {"huggingface.py", "lightning_module.py", "accelerate_loop.py"}  # in test_recipes.py
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


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of DCP, about its own arguments
def test_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = re.findall(
        r"(\w+): loss (\d\.\d+), then (\d\.\d+); .* losses: (\w+)", printed("by_name.py", tmp_path, monkeypatch, capsys)
    )
    assert [name for name, *_ in found] == ["AdamW", "stack", "routed"]
    for _, first, last, same in found:
        assert float(last) < 0.2 * float(first)
        assert same == "True"


def test_adamw_by_name_is_torchs() -> None:
    recipe = SimpleNamespace(**runpy.run_path(str(EXAMPLES / "by_name.py")))
    found = []
    for text in (recipe.ADAMW, recipe.ADAMW.replace("nestopt.", "torch.", 1)):
        model = recipe.network()
        optimizer = recipe.instantiate(text, model)
        recipe.train(model, optimizer, range(8))
        found.append((type(optimizer), [param.detach() for param in model.parameters()]))
    assert [cls for cls, _ in found] == [nestopt.optim.AdamW, torch.optim.AdamW]
    for ours, theirs in zip(found[0][1], found[1][1], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_export_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = printed("export_step.py", tmp_path, monkeypatch, capsys)
    found = re.findall(r"(\w+): .* differs by at most (\S+)", out)
    assert [name for name, _ in found] == ["gated_deltanet", "titans"]
    assert all(float(apart) < 1e-5 for _, apart in found)
    code = "import sys, torch; torch.export.load('step.pt2').module(); assert 'nestopt' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("level", ["retnet", "deltanet", "oja", "omega", "momentum", "adam"])
def test_an_exported_step_is_the_step(level: str) -> None:
    recipe = SimpleNamespace(**runpy.run_path(str(EXAMPLES / "export_step.py")))
    torch.manual_seed(0)
    layer = nestopt.layer(level, dim=8, heads=2)
    program, ours = recipe.export(layer, batch=3).module(), layer.init_state(3)
    theirs = ours
    with torch.no_grad():
        for _ in range(4):
            x = torch.randn(3, 8)
            (y, ours), (y_too, theirs) = layer.step(x, ours), program(x, theirs)
            torch.testing.assert_close((y_too, theirs), (y, ours), rtol=0, atol=0)


@pytest.mark.parametrize("level", ["attention", "titans"])
def test_a_step_whose_state_grows_is_not_exported(level: str) -> None:
    recipe = SimpleNamespace(**runpy.run_path(str(EXAMPLES / "export_step.py")))
    with pytest.raises(ValueError, match=f"{level}: its state grows from token to token; give chunk=1, or another"):
        recipe.export(nestopt.layer(level, dim=8, heads=2))


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
