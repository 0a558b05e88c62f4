"""The committed figures are what their scripts draw now, and those made with the site show what happened."""

from __future__ import annotations

import math
import runpy
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import pytest
import torch

import nestopt

DOCS = Path(__file__).parents[2] / "docs"


MADE_WITH_THE_SITE = {"continua.py", "level_table.py", "recall.py", "token_table.py", "trained.py", "trajectories.py"}


def script(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names of a script that writes to `folder`."""
    names = runpy.run_path(str(DOCS / "figures" / name))
    monkeypatch.setitem(names["main"].__globals__, "MADE", folder)
    return names["main"].__globals__


@pytest.mark.parametrize("script", sorted({path.name for path in (DOCS / "figures").glob("*.py")} - MADE_WITH_THE_SITE))
def test_figures_are_current(script: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main = runpy.run_path(str(DOCS / "figures" / script))["main"]
    monkeypatch.setitem(main.__globals__, "STATIC", tmp_path)
    main()
    made = sorted(tmp_path.iterdir())
    assert made
    for file in made:
        xml.etree.ElementTree.parse(file)
        assert file.read_text(encoding="utf-8") == (DOCS / "_static" / file.name).read_text(encoding="utf-8"), (
            f"{file.name} is out of date; run python docs/figures/{script}"
        )


@pytest.mark.parametrize("name", ["momentum", "muon", "dgd"])
def test_a_picture_of_a_level_is_the_same_each_time_and_says_what_it_shows(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = script("trajectories.py", tmp_path, monkeypatch)
    monkeypatch.setitem(names, "STEPS", 10)
    monkeypatch.setitem(names, "best", lambda kind, level: names["descend"](kind, level, 0.1))
    made = []
    for _ in range(2):
        names["make"](name, {})
        made.append((tmp_path / f"{name}.svg").read_text(encoding="utf-8"))
    assert made[0] == made[1]
    xml.etree.ElementTree.fromstring(made[0])
    assert f">{name}, lr 0.1<" in made[0]
    words = (tmp_path / f"{name}-figure.inc").read_text(encoding="utf-8")
    problem = names["PICTURES"][name].problem
    for key, level in {name: nestopt.build("level", name), "gd": nestopt.levels.gd()}.items():
        assert f"{key} {names['descend'](problem, level, 0.1).loss:.1e} (lr 0.1)" in words


def test_a_run_is_the_level_stepped_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = script("trajectories.py", tmp_path, monkeypatch)
    run = names["descend"](names["Valley"], nestopt.levels.gd(), 0.5)
    x, y = -1.5, 2.0
    for step in range(names["STEPS"]):
        rate = 0.5 * (1 - step / names["STEPS"])
        slope = 0.2 * (x - 1) - 1.2 * x * (y - x * x), 0.6 * (y - x * x)
        x, y = x - rate * slope[0], y - rate * slope[1]
    torch.testing.assert_close(run.weights[-1], torch.tensor([x, y], dtype=torch.float64), rtol=1e-9, atol=0)
    assert run.loss == pytest.approx(0.1 * (1 - x) ** 2 + 0.3 * (y - x * x) ** 2, rel=1e-9)


def test_the_best_rate_is_the_best_of_the_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = script("trajectories.py", tmp_path, monkeypatch)
    monkeypatch.setitem(names, "STEPS", 20)
    kind, level = names["Valley"], nestopt.levels.gd()
    found = names["best"](kind, level)
    ends = {rate: names["descend"](kind, level, rate).loss for rate in names["RATES"]}
    assert found.loss <= 1.01 * min(ends.values())
    assert all(loss > 1.01 * min(ends.values()) for rate, loss in ends.items() if rate < found.rate)
    assert ends[20.0] == math.inf
    monkeypatch.setitem(names, "RATES", (0.01, 0.02))
    with pytest.raises(ValueError, match="end of the grid"):
        names["best"](kind, level)


@pytest.mark.parametrize(
    ("level", "state", "passes", "flops"),
    [
        ("gd", {}, 3, 0),  # weight and gradient read, weight written
        ("momentum", {"momentum": 4}, 5, 0),
        ("adam", {"exp_avg": 4, "exp_avg_sq": 4}, 7, 0),
        ("delta_momentum", {"momentum": 4}, None, 4 * 64),  # (m gᵀ) g
        ("dgd", {}, None, 4 * 32 + 32 * 32 * 2 / 64),  # (G Xᵀ) X and X Xᵀ for 32 rows
    ],
)
def test_what_a_level_costs(
    level: str,
    state: dict[str, float],
    passes: float | None,
    flops: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = script("level_table.py", tmp_path, monkeypatch)["measure"](nestopt.build("level", level), (64, 256))
    assert found.state == state
    assert found.flops == flops
    if passes is not None:
        assert found.passes == pytest.approx(passes, rel=1e-3)  # the step count is a few bytes more
