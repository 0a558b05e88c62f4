"""The plan for many GPUs: what is counted at few blocks holds at many, and shares add up."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch

from nestopt.cli import main
from nestopt.config import Config, ConfigError
from nestopt.train.planning import Gpu, Sharing, count_pass, scale, scale_table
from nestopt.train.planning.parts import Parts
from nestopt.train.planning.passes import _count
from nestopt.train.planning.steps import dry_step

CONTEXT = {"level": "cms", "periods": [4, 8], "learn": "context", "teach": "loss", "through": "first_order"}
SELF = {"level": "self_modifying", "chunk": 8, "projection_chunk": 8}
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "transformer": ({"blocks": 7}, 32),
    "deltanet": ({"blocks": 5, "mixer": "deltanet"}, 32),
    "mixers in turn": ({"blocks": 9, "mixers": ["attention", "deltanet"]}, 16),
    "hope, deep": ({"blocks": 5, "mixer": SELF, "mlp": CONTEXT}, 8),
    "hope, long": ({"blocks": 1, "mixer": SELF, "mlp": CONTEXT, "segment": 8}, 36),
    "a continuum, deep and long": (
        {"blocks": 4, "mixer": "linear_attention", "mlp": {**CONTEXT, "periods": [4]}, "segment": 4},
        18,
    ),
    "deltanet in segments": ({"blocks": 2, "mixer": "deltanet", "segment": 8}, 64),
    "attention in segments, whose states grow": ({"blocks": 2, "segment": 8}, 64),
}


def small(blocks: int = 2, **more: Any) -> Config:
    model = {"dim": 16, "blocks": blocks, "heads": 2, **more.pop("model", {})}
    return Config.from_data({"model": model, "data": {"window": 16, "batch": 8}, **more})


@pytest.mark.parametrize("name", MODELS)
def test_a_few_blocks_and_segments_tell_of_all(name: str) -> None:
    model, window = MODELS[name]
    section = small(model=model).model
    whole = _count(section, 2, window, torch.float32, True)
    found = count_pass(section, 2, window)
    assert found.flops == whole.flops
    assert found.state == whole.state
    assert found.peak == pytest.approx(whole.peak, rel=5e-3)
    assert found.apart == pytest.approx(whole.apart, rel=5e-3)


def test_what_is_counted_is_not_all_that_there_is() -> None:
    counted: list[tuple[int, int]] = []
    section = small(model=MODELS["a continuum, deep and long"][0]).model
    from nestopt.train.planning import passes

    def noted(smaller: Any, rows: int, window: int, *rest: Any) -> Any:
        counted.append((smaller.blocks, window))
        return _count(smaller, rows, window, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "_count", noted)
        count_pass(section, 1, 800)
    assert sorted(counted) == [(2, 8), (2, 12), (3, 8), (3, 12)]


def test_shares_add_up_to_the_whole() -> None:
    parts = Parts.of(small(optimizer={"stack": "muon"}))
    alone = parts.step(Sharing())
    for sharing in (Sharing("deepspeed", 1, 3), Sharing("fsdp2", 0, 5)):
        owner = parts.owners(sharing.world)
        each = [parts.step(sharing, rank, owner) for rank in range(sharing.world)]
        counts = 4 * len(parts.shapes) * sharing.world  # steps are counted by each
        assert sum(step.held for step in each) == pytest.approx(alone.held, abs=counts)
        assert sum(step.flops for step in each) == pytest.approx(alone.flops)


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


def test_time_follows_from_operations() -> None:
    config = small()
    plan = scale(config, Sharing.of(config, 4, "ddp"), Gpu(tflops=1e-6, mfu=0.5), tokens=10_000)
    assert (plan.rows, plan.window, plan.tokens_per_step) == (2, 16, 128)
    assert plan.seconds == pytest.approx((plan.pass_flops + plan.step_flops) / 0.5e6)
    assert plan.days == pytest.approx(10_000 / 128 * plan.seconds / 86400)
    assert scale(config, Sharing.of(config, 4, "ddp")).tokens == config.train.steps * 128
    twice = small(train={"accumulate": 2})
    halves = scale(twice, Sharing.of(twice, 4, "ddp"))
    assert halves.rows == 1
    assert halves.pass_flops == plan.pass_flops


def test_steps_on_slow_clocks_count_as_often_as_they_come() -> None:
    shapes = {"w": torch.Size([8, 8])}
    plain = dry_step({"stack": _level("muon")}, shapes, torch.float32)
    slow = dry_step({"stack": _level({"level": "muon", "period": 4})}, shapes, torch.float32)
    assert slow.flops == plain.flops / 4
    assert slow.most == plain.most == plain.flops > 0
    assert dry_step({"stack": _level("muon"), "period": 4}, shapes, torch.float32).flops == plain.flops / 4
    both = dry_step({"stack": _level({"level": "m3", "slow_period": 3})}, shapes, torch.float32)
    assert both.flops == pytest.approx(plain.flops * 4 / 3)
    assert both.most == 2 * plain.most
    paper = dry_step({"stack": _level({"level": "m3", "slow_period": 3, "mode": "paper"})}, shapes, torch.float32)
    assert paper.flops == pytest.approx(plain.flops * 4 / 3)


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


@pytest.mark.parametrize(
    ("given", "flag"), [({"tflops": 0}, "tflops"), ({"mfu": 1.5}, "mfu"), ({"memory": -1}, "memory")]
)
def test_numbers_of_a_gpu_out_of_range(given: dict[str, float], flag: str) -> None:
    with pytest.raises(ConfigError, match=f"--{flag}"):
        Gpu(**given)


def test_batches_that_can_not_be_shared() -> None:
    config = small(train={"accumulate": 3})
    with pytest.raises(ConfigError, match=r"data\.batch: 8 .* multiple of 6, for 2 GPUs with 3 micro-batches each"):
        scale(config, Sharing.of(config, 2, "ddp"))
    with pytest.raises(ConfigError, match="--tokens: 0"):
        scale(small(), Sharing(), tokens=0)


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


def test_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["model.dim=16", "model.blocks=2", "model.heads=2", "data.window=16", "data.batch=8"]
    assert main(["plan", *given, "--gpus", "4", "--zero", "2", "--mfu", "0.3", "--tokens", "1000000"]) == 0
    text = capsys.readouterr().out
    assert "DeepSpeed ZeRO 2 on 4 GPUs, 2 x 16 tokens on each" in text
    assert "a step at 30% of 989 TFLOP/s" in text
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
    assert main(["plan", *given, "--gpus", "4", "--zero", "1", "--ranks", "--mfu", "0.3"]) == 2
    assert "--mfu: 0.3 is not allowed; --ranks tells no times" in capsys.readouterr().err
