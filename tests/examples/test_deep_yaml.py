"""A stack three levels deep, written in YAML, trains a language model from end to end."""

from __future__ import annotations

from pathlib import Path

import nestopt
from nestopt.core import Chain, Nest, Parallel
from nestopt.levels import momentum, newton_schulz
from nestopt.train.checkpoints.shards import ShardReader
from nestopt.train.loop import train
from nestopt.train.report import metrics

CONFIG = """
model:
  mixer: {level: linear_attention, features: elu, retention: {retention: decay, keep: {gate: 0.9}}}
  mlp: {level: cms, periods: [1, 4]}
  dim: 16
  blocks: 1
  heads: 2
optimizer:
  lr: 0.02
  rest: {stack: adam, lr: 0.01}
  stack:
    - level: parallel
      weights: [1.0, 0.5]
      levels:
        fast:
          level: nest
          outer: {level: momentum, beta: 0.5, period: 4}
          inner: {level: momentum, dampening: 0.1}
        slow: {level: momentum, period: 8}
    - newton_schulz
data: {window: 32, batch: 8}
train: {steps: 60, log_every: 5, eval_every: 0, final_bytes: 512, save_every: 40, sample_bytes: 0, threads: 1}
"""


def test_a_yaml_stack_three_levels_deep_trains_end_to_end(tmp_path: Path) -> None:
    text, file = tmp_path / "text.txt", tmp_path / "deep.yaml"
    text.write_text("the quick brown fox jumps over the lazy dog, and the dog sleeps on.\n" * 100)
    file.write_text(CONFIG)
    config = nestopt.load(file, [f"data.path={text}", f"train.out={tmp_path / 'runs'}"])
    stack = config.optimizer.stack
    assert stack == nestopt.chain(
        nestopt.parallel(
            fast=nestopt.nest(momentum(0.5, period=4), momentum(dampening=0.1)),
            slow=momentum(period=8),
            weights=[1.0, 0.5],
        ),
        newton_schulz(),
    )
    assert isinstance(stack, Chain)
    assert isinstance(stack.levels["parallel"], Parallel)
    assert isinstance(stack.levels["parallel"].levels["fast"], Nest)

    result = train(config, quiet=True)

    assert result.finished
    losses = [record["train/loss"] for record in metrics.read(result.run.metrics_file) if "train/loss" in record]
    assert losses[-1] < 0.5 * losses[0]
    with ShardReader(result.run.path) as parts:
        saved = list(parts.keys())
    keys = {key.rpartition("|")[2] for key in saved if key.startswith("optimizer.blocks.0.mixer.query.weight|")}
    assert keys == {
        "step",
        "parallel.fast.inner.momentum",
        "parallel.fast.outer.momentum.momentum",
        "parallel.fast.start.momentum",
        "parallel.slow.clock_read",
        "parallel.slow.clock_sum",
        "parallel.slow.momentum",
    }
    assert nestopt.load(result.run.config_file) == config
