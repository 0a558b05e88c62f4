"""Models side by side: of one size, on the same bytes, each still and learning as it reads."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import numpy as np
import pytest
import torch

from nestopt.cli import main
from nestopt.config import Config, ConfigError, load
from nestopt.levels import attention, cms, deltanet, self_modifying, window_attention
from nestopt.models import build_model
from nestopt.train.compare import Row, like, parameters, spread, table
from nestopt.train.data.text import held_out_text, text_beside
from nestopt.train.evaluate import stream_bits_per_byte
from nestopt.train.reading import FACTORS, learner, reading_rule
from nestopt.train.report.metrics import read


def test_a_transformer_of_as_many_parameters() -> None:
    config = Config.from_data({"model": {"mixer": "deltanet", "gate_output": True, "dim": 32, "heads": 2}})
    config.train.eval_streams = 0
    other = like(config, "transformer")
    assert other.model.mixer == attention()
    assert parameters(other.model) == pytest.approx(parameters(config.model), rel=0.005)
    assert other.optimizer == config.optimizer
    assert other.data == config.data
    streaming = config.model_copy(update={"train": config.train.model_copy(update={"eval_streams": 4})})
    mixer = like(streaming, "transformer").model.mixer
    assert isinstance(mixer, window_attention)
    assert mixer.memory.size == config.data.window


@pytest.mark.parametrize(
    "name", ["transformer", "hope-attention", "retnet", "deltanet", "gated_deltanet", "titans", "hope"]
)
def test_any_model_of_as_many_parameters_that_may_do_the_same(name: str) -> None:
    config = Config()
    other = like(config, name)
    assert parameters(other.model) == pytest.approx(parameters(config.model), rel=0.02)
    mine, its = config.model.mlp, other.model.mlp
    assert dataclasses.replace(its, memory=mine.memory) == mine
    kept = ("dim", "blocks", "heads", "conv", "gate_output", "vocab", "tie", "precision")
    assert all(getattr(other.model, key) == getattr(config.model, key) for key in kept)
    assert other.train == config.train


@pytest.mark.parametrize("blocks", [1, 2, 3, 5])
def test_the_last_block_has_the_last_mlp(blocks: int) -> None:
    config = load({"model": {"dim": 16, "heads": 2, "blocks": blocks}})
    model = build_model(config.model)
    assert [block.mlp.taught for block in model.blocks] == [False] * (blocks - 1) + [True]
    assert parameters(config.model) == sum(p.numel() for p in model.parameters())


def test_each_block_keeps_the_kind_of_its_mlp() -> None:
    mlps = [
        {"level": "cms", "periods": [1]},
        {"level": "cms", "periods": [16, 32], "learn": "context", "teach": "loss"},
    ]
    config = Config.from_data({"model": {"mixer": "retnet", "mlps": mlps, "blocks": 2}})
    other = like(config, "deltanet")
    assert [(mlp.learn, mlp.periods) for mlp in other.model.mlps] == [("static", (1,)), ("context", (16,))]
    assert parameters(other.model) == pytest.approx(parameters(config.model), rel=0.02)


@pytest.mark.parametrize("learn", ["all", "mixer"])
@pytest.mark.parametrize("periods", [[1], [32]])
def test_mlps_are_trained_alike(learn: str, periods: list[int]) -> None:
    mlp = {"level": "cms", "periods": periods, **({} if periods == [1] else {"learn": "context", "teach": "loss"})}
    config = Config.from_data({"model": {"mixer": "retnet", "mlp": mlp}, "train": {"learn": learn}})
    other = like(config, "deltanet")
    assert isinstance(other.model.mixer, deltanet)
    assert (other.train, other.model.mlp.learn) == (config.train, config.model.mlp.learn)


def test_hope_is_the_mixer_that_the_run_has() -> None:
    mixer = like(load("examples/hope.yaml"), "hope").model.mixer
    assert isinstance(mixer, self_modifying)
    assert mixer.adaptive == ("k",)
    assert like(Config.from_data({"model": {"mixer": "retnet"}}), "hope").model.mixer == self_modifying()


@pytest.mark.parametrize(("name", "words"), [("deltanett", "deltanet"), ("cms", "--baseline"), ("", "--baseline")])
def test_what_is_no_model_is_refused_before_anything_is_trained(name: str, words: str, tmp_path, capsys) -> None:
    with pytest.raises(ConfigError, match=words):
        like(Config(), name)
    assert main(["train", f"train.out={tmp_path}/runs", "--baseline", f"deltanet,{name}"]) == 2
    assert "--baseline" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_model_that_is_too_small_for_it() -> None:
    config = Config.from_data(
        {
            "model": {
                "mixer": "retnet",
                "mlp": {"level": "cms", "periods": [1], "memory": {"memory": "mlp", "hidden": 1}},
            }
        }
    )
    with pytest.raises(ConfigError, match=r"--baseline: 'titans' is not allowed; it has [\d,]+ parameters or more"):
        like(config, "titans")


def test_the_same_weights_learn_as_they_read() -> None:
    """A Transformer's MLPs, under a continuum's names: still, it is what it was; its own text it reads better."""
    section = {"mixer": "attention", "dim": 16, "heads": 2, "blocks": 2, "mlp": {"level": "cms", "periods": [1]}}
    config = Config.from_data({"model": section})
    torch.manual_seed(0)
    model = build_model(config.model).eval()
    learning = learner(config, model, reading_rule(config.model.mlp))
    assert learning is not None
    text = torch.tensor(list(b"abcab") * 60, dtype=torch.uint8)
    whole = dict(model.state_dict())
    for key, value in learning.state_dict().items():
        if not key.endswith(".rate"):
            assert torch.equal(value, whole[key.replace("every_32", "every_1")])
    bits = stream_bits_per_byte(model, text, streams=2, piece=16)
    still = stream_bits_per_byte(learning, text, streams=2, piece=16, learn="mixer")
    assert still == pytest.approx(bits, abs=1e-6)
    assert stream_bits_per_byte(learning, text, streams=2, piece=16) < still - 0.05
    assert reading_rule(cms(periods=(4, 16))).periods == (4, 16)
    two = Config.from_data({"model": {**section, "mlp": {"level": "cms", "periods": [1, 4]}}})
    assert learner(two, build_model(two.model), reading_rule(two.model.mlp)) is None


def test_where_one_block_learns_it_alone_does() -> None:
    mlps = [{"level": "cms", "periods": [1]}, {"level": "cms", "periods": [4], "learn": "context", "teach": "loss"}]
    some = Config.from_data({"model": {"mixer": "retnet", "dim": 16, "heads": 2, "blocks": 2, "mlps": mlps}})
    last = build_model(some.model)
    other = learner(some, last, dataclasses.replace(some.model.mlps[1], periods=(8,)))
    assert other is not None
    assert [block.mlp.taught for block in other.blocks] == [False, True]
    found = other.state_dict()
    for key, value in last.state_dict().items():
        assert torch.equal(found[key.replace("1.mlp.levels.every_4", "1.mlp.levels.every_8")], value)


@pytest.mark.parametrize(("length", "tested"), [(1000, 300), (1000, 997), (1000, 1000), (1000, 2000), (40, 16), (1, 1)])
def test_rates_are_chosen_by_other_bytes_than_those_that_are_measured(length: int, tested: int) -> None:
    held_out = np.arange(length)
    used, beside = held_out_text(held_out, tested), text_beside(held_out, tested, 200)
    assert not set(used) & set(beside)
    assert len(beside) == min(200, max(0, length - tested))


def test_a_run_beside_others(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one level two level three level " * 800)
    given = "model.dim=16 model.blocks=1 model.heads=2 data.window=16 data.batch=2 train.steps=6 train.eval_every=3"
    more = "train.final_bytes=300 train.eval_bytes=300 train.eval_streams=2 train.sample_bytes=0"
    baseline = ["--baseline", "transformer,deltanet", "--seeds", "2"]
    given = [*given.split(), *more.split(), f"train.out={tmp_path}/runs", "--data", str(text)]
    assert main(["train", *given, *baseline]) == 0
    said = capsys.readouterr().out
    lines = said[said.index("parameters  steps") :].splitlines()
    names = [
        "this model",
        *(f"{name}, equal {what}" for name in ("transformer", "deltanet") for what in ("tokens", "seconds")),
    ]
    assert [line.split("  ")[0].strip() for line in lines[1:6]] == names
    run = tmp_path / "runs" / "001"
    assert (run / "compare.png").stat().st_size > 10_000
    rows = [Row(**row) for row in json.loads((run / "compare.json").read_text())]
    assert [row.seed for row in rows] == [0] * 5 + [1] * 5
    still, learning = ([getattr(row, key) for row in rows[::5]] for key in ("still", "learning"))
    assert [spread(still), spread(learning)] == re.findall(r"\d\.\d+ ± \d\.\d+", table(rows, 0, 0).splitlines()[1])
    for row in rows:
        assert row.steps == 6 or row.limit == "equal seconds"
        assert row.learning is not None
        assert 0 < row.learning < 9
        assert row.rate == pytest.approx(min((0.05 * f for f in FACTORS), key=lambda r: abs(math.log(r / row.rate))))
        assert min(row.still_s, row.learning_s) > 0
    trained = [read(run / "baseline" / f"{i:03}" / "metrics.jsonl")[-1]["step"] for i in range(1, 10)]
    assert trained == [row.steps for row in rows[1:]]
    # the one that is measured first is what the run has said of itself, at the rate that it has
    assert rows[0].still == pytest.approx(still_bits(run), abs=1e-6)


def still_bits(path) -> float:
    from nestopt.train.data import sources
    from nestopt.train.run import Run

    run = Run.open(path)
    config = run.config()
    text = sources.make(config).held_out(config.train.final_bytes)
    return stream_bits_per_byte(run.load_model(), text.tokens, streams=2, piece=16, learn="mixer")


def test_spreads() -> None:
    assert spread([1.5]) == "1.500"
    assert spread([1.0, 2.0, 3.0]) == "2.000 ± 1.000"
