"""A trained model, still or learning as it reads: its rate, period and keep are chosen on text that is not measured."""

from __future__ import annotations

import re

import pytest
import torch

from nestopt.cli import main
from nestopt.train.loop import train
from nestopt.train.run import Run
from tests.train.test_loop import config

WORDS = "one level two level three level four level five level six level "


@pytest.fixture(scope="module", params=["static", "context", "two levels"])
def run(request, tmp_path_factory) -> Run:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text.txt").write_text("".join(WORDS[i % 7 :] for i in range(600)))
    mlps = {
        "static": {"level": "cms", "periods": [1]},
        "context": {"level": "cms", "periods": [8], "learn": "context", "teach": "loss", "keep": 0.9},
        "two levels": {"level": "cms", "periods": [1, 2]},
    }
    settings = {"train__steps": 8, "train__eval_every": 0, "train__eval_streams": 2, "train__final_bytes": 800}
    return train(config(folder / "text.txt", folder, model__mlp=mlps[request.param], **settings), quiet=True).run


def test_it_is_tuned_and_kept_as_a_run(run: Run, tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "tuned"
    status = main(["tune-reading", str(run.path), "--bytes", "400", "--out", str(out), "-q"])
    said = capsys.readouterr()
    mlp = run.config().model.mlp
    if len(mlp.periods) > 1:
        assert status == 2
        assert "model.mlp.periods: [1, 2] is not allowed; give an mlp of one level" in said.err
        assert not out.exists()
        return
    assert status == 0, said.err
    lines = said.out.splitlines()
    end = next(i for i, line in enumerate(lines) if line.startswith("bits per byte of 400"))
    bits = [float(line.split()[3]) for line in lines[1:end]]
    assert bits == sorted(bits)
    assert len(bits) == 4 * 5 + 3 * (2 if mlp.keep == 1 else 3)
    after = {
        match[1]: float(match[2])
        for line in lines
        if (match := re.match(r"  (still|as it was|as chosen) +([\d.]+) ", line))
    }
    assert set(after) == ({"still", "as chosen"} if mlp.learn == "static" else {"still", "as it was", "as chosen"})
    assert after["as chosen"] < after["still"]

    # what was written is what was chosen, and reads as it did
    tuned = Run.open(out)
    period, keep, rate, *_ = lines[1].split()
    chosen = tuned.config().model.mlp
    assert (list(chosen.periods), chosen.keep) == ([int(period)], float(keep))
    assert chosen.rate == pytest.approx(float(rate), rel=0.01)
    model, before = tuned.load_model(), run.load_model()
    for name, value in model.state_dict().items():
        if not name.endswith(".rate"):
            old = re.sub(r"every_\d+", f"every_{mlp.periods[0]}", name)
            assert torch.equal(value, before.state_dict()[old])
    assert main(["generate", str(out), "--length", "3", "--prompt", "one"]) == 0


def test_a_folder_that_is_there_is_not_written_to(run: Run, tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune-reading", str(run.path), "--out", str(tmp_path)]) == 2
    assert "--out: " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
