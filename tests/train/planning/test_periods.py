"""Costs that are counted, not run, and what they say of time."""

from __future__ import annotations

import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nestopt.cli import main
from nestopt.config import Config, ConfigError
from nestopt.models.cost import Cost, cost_of, state_bytes, step_cost
from nestopt.train.planning.periods import Machine, choice, plan, table, with_periods


def small(**model: object) -> Config:
    return Config.from_data(
        {
            "model": {
                "mixer": "attention",
                "mlp": {"level": "cms", "periods": [1]},
                "gate_output": False,
                "dim": 16,
                "blocks": 1,
                "heads": 2,
                **model,
            },
            "data": {"window": 32, "batch": 2},
        }
    )


def test_counts_what_is_done() -> None:
    with FakeTensorMode():
        a, b = torch.zeros(3, 4), torch.zeros(4, 5)
        assert cost_of(lambda: a @ b) == Cost({"float32": 2 * 3 * 4 * 5}, 4 * (12 + 20 + 15), 1)
        assert cost_of(lambda: (a.view(12).expand(7, 12), a.mT)) == Cost()
        assert cost_of(lambda: a.expand(9, 3, 4).sum()).bytes == 4 * (12 + 1)
        assert cost_of(lambda: (a @ b, a @ b)) == cost_of(lambda: a @ b) + cost_of(lambda: a @ b)
    x, y = torch.randn(3, 4), torch.randn(4, 5)
    assert cost_of(lambda: x @ y) == Cost({"float32": 2 * 3 * 4 * 5}, 4 * (12 + 20 + 15), 1)  # on what holds data, too


def test_a_step_of_a_transformer() -> None:
    section = small().model
    cost = step_cost(section, 2, 32)
    weights = 4 * 16 * 16 + 8 * 16 * 16 + 16 * 256  # of matrices that tokens are multiplied with
    scores = 2 * 2 * 2 * 2 * 32 * 32 * 8
    assert cost.flops == pytest.approx(3 * 2 * weights * 64 + 3 * scores, rel=0.1)
    assert step_cost(section, 4, 32).flops == 2 * cost.flops
    large = section.model_copy(update={"dim": 8192, "heads": 64, "blocks": 40})  # needs no memory
    assert step_cost(large, 1, 16).flops > 1e12


def test_the_choice_of_periods_keeps_the_size() -> None:
    section = small(mlp={"level": "cms", "periods": [4, 8]}).model
    for periods in (None, (4,), (4, 8), (2, 4, 8, 16)):
        mlp = with_periods(section, periods).mlp
        count = 1 if periods is None else len(periods)
        assert mlp.memory.hidden * count == 128
        assert mlp.learn == ("static" if periods is None else "context")


def test_more_writes_cost_more() -> None:
    machine = Machine(1e-11, 1e-11, 1e-6)
    rows = plan(small(), [None, (16,), (4,), (4, 16)], machine=machine)
    static, slow, fast, both = rows
    assert static.cost.flops < slow.cost.flops
    assert slow.seconds < fast.seconds < both.seconds
    assert static.state < slow.state
    assert slow.state == state_bytes(with_periods(small().model, (16,)))
    text = table(rows)
    assert text.splitlines()[0].split()[:2] == ["levels", "periods"]
    assert "1.00" in text.splitlines()[1]


def test_periods_as_they_are_typed() -> None:
    assert choice("16,64") == (16, 64)
    assert choice("7") == (7,)
    assert choice("static") is None
    for wrong in ("0", "16,", "a", "-2,4", ""):
        with pytest.raises(ConfigError, match=re.escape(f"--periods: {wrong!r}")):
            choice(wrong)


def test_a_plan_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    given = "model.dim=8 model.blocks=1 model.heads=2 data.window=16 data.batch=2 model.mixers=[attention]"
    assert main(["plan", *given.split(), "--periods", "static", "4", "--check"]) == 0
    head, static, four = capsys.readouterr().out.strip().splitlines()
    assert head.split()[-1] == "error"
    assert static.split()[:2] == ["static", "-"]
    assert four.split()[:2] == ["1", "4"]
    assert all(row.rstrip().endswith("%") for row in (static, four))
    assert main(["plan", "--periods", "0"]) == 2
    assert "give whole numbers of tokens" in capsys.readouterr().err
