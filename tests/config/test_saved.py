"""What was saved under other defaults means what it meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from nestopt import Config, Gate, Level
from nestopt.config import as_saved, build, to_spec
from nestopt.levels import dla, momentum, titans, ttt
from nestopt.parts import Decay, Mlp
from nestopt.train.run import Run

STEP = {"memory": Mlp(), "chunk": 16, "normalized": True, "forget": "all"}
TITANS = STEP | {"rule": momentum(Gate(0.5)), "retention": Decay(Gate(0.99))}

BEFORE = {
    "mixer: ttt": ttt(**STEP),
    "mixer: titans": titans(**TITANS),
    "mixer: {level: dla, chunk: 4, normalized: false}": dla(**TITANS | {"chunk": 4, "normalized": False}),
    "mixer: {level: titans, rule: {level: momentum, beta: 0.3}}": titans(**TITANS | {"rule": momentum(0.3)}),
}
"""What a run's config.yaml had, and what it meant."""


@pytest.mark.parametrize("text", BEFORE)
def test_a_run_of_before_keeps_the_defaults_of_then(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(f"model: {{{text}}}\n", encoding="utf-8")
    assert Run.open(tmp_path).config().model.mixer == BEFORE[text]


@pytest.mark.parametrize("level", [ttt(), titans(), dla(forget="all"), titans(**TITANS)])
def test_a_run_of_now_is_read_as_it_was_begun(level: Level, tmp_path: Path) -> None:
    config = Config.from_data({"model": {"mixer": to_spec(level)}, "train": {"out": str(tmp_path)}})
    assert config.model.mixer == level
    run = Run.create(config)
    assert "forget: " in run.config_file.read_text(encoding="utf-8")
    assert run.config() == config


def test_only_what_is_saved_is_read_so() -> None:
    assert to_spec(titans()) == "titans"
    assert build("level", "titans") == titans()
    with as_saved():
        assert to_spec(titans()) == {"level": "titans", "forget": "outer"}
        assert build("level", "titans") == titans(**TITANS)
