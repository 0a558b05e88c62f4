"""The plan for many GPUs: what is counted at few blocks holds at many, and shares add up."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from nestopt.cli import main
from nestopt.config import Config, ConfigError
from nestopt.models import HopeLM
from nestopt.train.planning import Gpu, Rates, Sharing, count_pass, passes, scale, scale_table
from nestopt.train.planning.parts import Parts
from nestopt.train.planning.passes import _count
from nestopt.train.planning.steps import dry_step

CONTEXT = {"level": "cms", "periods": [4, 8], "learn": "context", "teach": "loss", "through": "first_order"}
SELF = {"level": "self_modifying", "chunk": 8, "projection_chunk": 8}
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "transformer": ({"blocks": 7}, 32),
    "deltanet": ({"blocks": 8, "mixer": "deltanet"}, 32),
    "mixers in turn": ({"blocks": 13, "mixers": ["attention", "deltanet"]}, 16),
    "hope, deep": ({"blocks": 5, "mixer": SELF, "mlp": CONTEXT}, 8),
    "hope, long": ({"blocks": 1, "mixer": SELF, "mlp": CONTEXT, "segment": 8}, 52),
    "a continuum, deep and long": (
        {"blocks": 6, "mixer": "linear_attention", "mlp": {**CONTEXT, "periods": [4]}, "segment": 4},
        26,
    ),
    "deltanet in segments": ({"blocks": 2, "mixer": "deltanet", "segment": 8}, 64),
    "attention in segments, whose states grow": ({"blocks": 2, "segment": 8}, 64),
}


def small(blocks: int = 2, **more: Any) -> Config:
    transformer = {"mixer": "attention", "mlp": {"level": "cms", "periods": [1]}, "gate_output": False}
    model = {**transformer, "dim": 16, "blocks": blocks, "heads": 2, **more.pop("model", {})}
    if "mixers" in model:
        del model["mixer"]
    train = {"learn": "all", **more.pop("train", {})}
    return Config.from_data({"model": model, "data": {"window": 16, "batch": 8}, "train": train, **more})


@pytest.mark.parametrize("name", MODELS)
def test_a_few_blocks_and_segments_tell_of_all(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, window = MODELS[name]
    monkeypatch.setattr(passes, "PIECE", 4)
    section = small(model=model).model
    whole = _count(section, 2, window, torch.float32, True, "meta")
    found = count_pass(section, 2, window)
    assert found.cost == whole.cost
    assert found.state == whole.state
    assert found.peak == pytest.approx(whole.peak, rel=0.015)
    assert found.apart == pytest.approx(whole.apart, rel=0.015)


def test_what_is_counted_is_not_all_that_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[tuple[int, int]] = []
    monkeypatch.setattr(passes, "PIECE", 2)
    section = small(model={**MODELS["a continuum, deep and long"][0], "mlp": {**CONTEXT, "periods": [8]}}).model

    def noted(smaller: Any, rows: int, window: int, *rest: Any) -> Any:
        counted.append((smaller.blocks, window))
        return _count(smaller, rows, window, *rest)

    monkeypatch.setattr(passes, "_count", noted)
    count_pass(section, 1, 800)
    assert sorted(counted) == [(2, 16), (2, 24), (3, 16), (3, 24)]
    counted.clear()
    count_pass(section, 1, 800, learn="mixer")  # to clocks that nothing is written on no segment needs to fit
    assert sorted(counted) == [(2, 8), (2, 12), (3, 8), (3, 12)]


def test_the_loss_is_made_in_pieces_as_in_training() -> None:
    assert inspect.signature(HopeLM.loss).parameters["piece"].default == passes.PIECE


@pytest.mark.slow
def test_dtypes_are_counted_apart_and_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passes, "PIECE", 4)
    section = small(model=MODELS["a continuum, deep and long"][0]).model
    whole = _count(section, 2, 25, torch.bfloat16, True, "meta")
    found = count_pass(section, 2, 25, dtype=torch.bfloat16, learn=True)
    assert found.cost == whole.cost
    assert set(found.cost.products) == {"bfloat16", "float32"}
    assert all(type(number) is int for number in (*found.cost.products.values(), found.cost.bytes, found.cost.ops))


def test_shares_add_up_to_the_whole() -> None:
    parts = Parts.of(small(optimizer={"stack": "muon"}))
    alone = parts.step(Sharing())
    for sharing in (Sharing("deepspeed", 1, 3), Sharing("fsdp2", 0, 5)):
        owner = parts.owners(sharing.world)
        each = [parts.step(sharing, rank, owner) for rank in range(sharing.world)]
        counts = 4 * len(parts.shapes) * sharing.world  # steps are counted by each
        assert sum(step.held for step in each) == pytest.approx(alone.held, abs=counts)
        assert sum(step.cost.flops for step in each) == pytest.approx(alone.cost.flops)


def test_what_is_spread_gets_smaller() -> None:
    config = small(train={"dtype": "bfloat16"})
    plans = [scale(config, Sharing.of(config, 4, "deepspeed", stage)).memory for stage in range(4)]
    numel = Parts.of(config).numel
    assert [plan.weights for plan in plans[:3]] == [2 * numel] * 3
    assert plans[3].weights == pytest.approx(numel / 2, rel=0.01)
    assert [plan.gradients for plan in plans[:2]] == [2 * numel] * 2
    assert plans[2].gradients == plans[3].gradients == pytest.approx(numel / 2, rel=0.01)
    assert plans[0].masters == 4 * numel
    assert plans[1].masters == pytest.approx(numel, rel=0.01)
    assert plans[1].states < plans[0].states / 3
    fsdp = scale(config, Sharing.of(config, 4, "fsdp2")).memory
    assert (fsdp.weights, fsdp.masters) == (0, plans[3].masters)


def test_what_is_sent() -> None:
    config = small(optimizer={"stack": "muon"})
    parts = Parts.of(config)
    size = 4 * parts.numel
    hidden = sum(parts.shapes[name].numel() for name in parts.costs())
    assert scale(config, Sharing.of(config, 4, "ddp")).sent == {"gradients": pytest.approx(1.5 * size)}
    one = scale(config, Sharing.of(config, 4, "deepspeed", 1)).sent
    assert (one["gradients"], one["weights"]) == (pytest.approx(0.75 * size), pytest.approx(0.75 * size))
    assert one["owners"] >= 12 * hidden * 0.75 / 4  # the mean, of three numbers each
    three = scale(config, Sharing.of(config, 4, "deepspeed", 3)).sent
    assert three["weights"] == pytest.approx(1.5 * size)
    pieces = small(optimizer={"stack": "muon"}, train={"accumulate": 2})
    assert scale(pieces, Sharing.of(pieces, 4, "ddp")).sent == {"gradients": pytest.approx(1.5 * size)}
    assert scale(pieces, Sharing.of(pieces, 4, "deepspeed", 3)).sent["weights"] == pytest.approx(3 * size)


@pytest.mark.parametrize("binding", ["launches", "bytes", "products"])
def test_time_is_that_of_what_takes_longest(binding: str) -> None:
    config = small(optimizer={"stack": "muon"})
    slow = dict.fromkeys(("launches", "bytes", "products"), 1.0) | {binding: 1e9}
    flops = {"float32": 1e15 / slow["products"], "tf32": 1e15, "bfloat16": 2e15 / slow["products"]}
    rates = Rates(1e-9 * slow["launches"], 1e15 / slow["bytes"], flops)
    plan = scale(config, Sharing.of(config, 4, "ddp"), Gpu(rates=rates), tokens=10_000)
    assert (plan.rows, plan.window, plan.tokens_per_step) == (2, 16, 128)
    both = plan.passes + plan.step
    assert set(both.products) == {"float32", "bfloat16"}  # muon's steps are in bfloat16 on accelerators
    assert plan.times == {
        "launches": pytest.approx(both.ops * rates.per_launch_s),
        "bytes": pytest.approx(both.bytes / rates.bytes_per_s),
        "products": pytest.approx(sum(both.products[dtype] / flops[dtype] for dtype in both.products)),
    }
    assert plan.binding == binding
    assert plan.seconds == max(plan.times.values())
    assert plan.days == pytest.approx(10_000 / 128 * plan.seconds / 86400)
    text = scale_table(plan)
    assert f"a step at the least: {binding} bind" in text
    assert ("launches aside, as in a CUDA graph" in text) == (binding == "launches")


def test_micro_batches_take_as_much_together() -> None:
    config = small()
    plan = scale(config, Sharing.of(config, 4, "ddp"))
    assert scale(config, Sharing.of(config, 4, "ddp")).tokens == config.train.steps * 128
    twice = small(train={"accumulate": 2})
    halves = scale(twice, Sharing.of(twice, 4, "ddp"))
    assert halves.rows == 1
    assert halves.passes.flops == plan.passes.flops
    assert halves.passes.ops == 2 * count_pass(twice.model, 1, 16).cost.ops


def test_steps_on_slow_clocks_count_as_often_as_they_come() -> None:
    shapes = {"w": torch.Size([8, 8])}
    plain = dry_step({"stack": _level("muon")}, shapes, torch.float32)
    slow = dry_step({"stack": _level({"level": "muon", "period": 4})}, shapes, torch.float32)
    assert slow.cost.flops == plain.cost.flops / 4
    assert slow.most == plain.most == plain.cost.flops > 0
    assert slow.cost.ops < plain.cost.ops
    assert dry_step({"stack": _level("muon"), "period": 4}, shapes, torch.float32).cost.flops == plain.cost.flops / 4
    both = dry_step({"stack": _level({"level": "m3", "slow_period": 3})}, shapes, torch.float32)
    assert both.cost.flops == pytest.approx(plain.cost.flops * 4 / 3)
    assert both.most == 2 * plain.most
    paper = dry_step({"stack": _level({"level": "m3", "slow_period": 3, "mode": "paper"})}, shapes, torch.float32)
    assert paper.cost.flops == pytest.approx(plain.cost.flops * 4 / 3)


def test_a_step_of_adamw_is_one_launch_and_its_clock_is_the_hosts() -> None:
    shapes = {name: torch.Size([8, 8]) for name in "ab"}
    done = dry_step({"stack": _level("adamw")}, shapes, torch.float32)
    # the kernel, and the step's number for it; parameters and two states are read and written, gradients read
    assert done.cost.ops == 2
    assert done.cost.bytes == pytest.approx(2 * 64 * 4 * 7, rel=0.01)
    assert done.held == 2 * 64 * 4 * 2


def _level(spec: Any) -> Any:
    from nestopt.config.spec import build

    return build("level", spec)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "engine": ({"engine": "horovod"}, "--engine: 'horovod' is not allowed; give one of single, ddp, fsdp2, deepspeed"),
    "gpus": ({"engine": "ddp", "world": 0}, "--gpus: 0 "),
    "stage": ({"engine": "deepspeed", "stage": 4}, "--zero: 4 "),
    "stage of another": ({"engine": "ddp", "stage": 1, "world": 2}, "--zero: 1 "),
    "one process": ({"world": 8}, "--gpus: 8 "),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_go_together_is_refused(name: str) -> None:
    given, message = WRONG[name]
    with pytest.raises(ConfigError, match=re.escape(message)):
        Sharing(**given)


@pytest.mark.parametrize("memory", [0, -1.0, math.nan, math.inf])
def test_memory_out_of_range(memory: float) -> None:
    with pytest.raises(ConfigError, match=f"--memory: {memory} is not allowed; give a number above 0"):
        Gpu(memory)


def test_batches_that_can_not_be_shared() -> None:
    config = small(train={"accumulate": 3})
    with pytest.raises(ConfigError, match=r"data\.batch: 8 .* multiple of 6, for 2 GPUs with 3 micro-batches each"):
        scale(config, Sharing.of(config, 2, "ddp"))
    with pytest.raises(ConfigError, match="--tokens: 0"):
        scale(small(), Sharing(), tokens=0)


def test_a_dtype_without_a_rate_is_refused() -> None:
    config = small(train={"dtype": "float64"})
    with pytest.raises(ConfigError, match=r"train\.dtype: 'float64' .* float32, tf32, bfloat16 and float16"):
        scale(config, Sharing.of(config, 1))
    half = small(train={"dtype": "float16"})
    assert "products in float16" in scale_table(scale(half, Sharing.of(half, 1)))


def test_a_sharing_from_a_configuration() -> None:
    config = small(train={"engine": "deepspeed", "zero_stage": 2, "dtype": "bfloat16"})
    assert Sharing.of(config, 4) == Sharing("deepspeed", 2, 4, 1, torch.bfloat16)
    assert Sharing.of(config, 4, stage=1).stage == 1
    assert Sharing.of(config, 4, "ddp").stage == 0
    assert Sharing.of(small(), 4, stage=2).engine == "deepspeed"


def test_the_table_says_whether_it_fits() -> None:
    config = small()
    plan = scale(config, Sharing.of(config, 8, "deepspeed", 1))
    assert "at the most; fits in 80 GB" in scale_table(plan)
    assert "does not fit in 1e-06 GB" in scale_table(dataclasses.replace(plan, gpu=Gpu(memory=1e-6)))
    assert "DeepSpeed ZeRO 1 on 8 GPUs, 1 x 16 tokens on each\n" in scale_table(plan)
    assert "tokens on each; mixers only write\n" in scale_table(dataclasses.replace(plan, learn="mixer"))


PRINTED = {
    "1.3b, at the top": ("examples/scale/1.3b.yaml --gpus 8 --zero 1", 0),
    "340m, its times": ("examples/scale/340m.yaml --gpus 1 --engine single train.accumulate=32", 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PRINTED)
def test_the_docs_show_what_is_printed(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    command, part = PRINTED[name]
    root = Path(__file__).parents[3]
    page = (root / "docs" / "scale.md").read_text(encoding="utf-8")
    assert f"nestopt plan {command}\n" in page
    args = [str(root / word) if word.endswith(".yaml") else word for word in command.split()]
    assert main(["plan", *args, "--rates", "stated"]) == 0
    printed = capsys.readouterr().out
    shown = printed if part == 0 else printed[printed.index("time of a GPU") : printed.index("\n\nsent by")]
    assert f"```text\n{shown.strip()}\n```" in page


def test_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["model.dim=16", "model.blocks=2", "model.heads=2", "data.window=16", "data.batch=8"]
    assert main(["plan", *given, "--gpus", "4", "--zero", "2", "--share", "0.3", "--tokens", "1000000"]) == 0
    text = capsys.readouterr().out
    assert "DeepSpeed ZeRO 2 on 4 GPUs, 2 x 16 tokens on each" in text
    assert "Rates: stated, not measured: 30% of the peaks of an H100 SXM's data sheet, and 5 µs a launch." in text
    assert "the run of 1,000,000 tokens" in text
    assert main(["plan", *given, "--gpus", "4", "--zero", "1", "--ranks"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 1 + 4 + 1
    assert lines[-1].split()[0] == "max/mean"
    assert main(["plan", *given, "--gpus", "4"]) == 2
    assert "give --engine ddp, fsdp2 or deepspeed" in capsys.readouterr().err
    assert main(["plan", *given, "--gpus", "4", "--engine", "ddp", "--ranks"]) == 2
    assert "give --zero 1, 2 or 3" in capsys.readouterr().err
    assert main(["plan", *given, "--zero", "1"]) == 2
    assert "--zero: 1 is not allowed; it is about a run on many GPUs; give --gpus too" in capsys.readouterr().err
    assert main(["plan", *given, "--gpus", "4", "--zero", "1", "--check"]) == 2
    assert "--check: True is not allowed" in capsys.readouterr().err
    assert main(["plan", *given, "--gpus", "4", "--zero", "1", "--ranks", "--share", "0.3"]) == 2
    assert "--share: 0.3 is not allowed; --ranks tells no times" in capsys.readouterr().err
