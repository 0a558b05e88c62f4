"""DeepSpeed ZeRO 1 and FSDP2 in one process, over NCCL where there is CUDA: trained, saved, and resumed bit for bit."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.gpu_parts.clock import wait
from benchmarks.gpu_parts.setting import Row, Setting, attempts, error_of, generator
from benchmarks.rows import Missing
from nestopt.config import Config
from nestopt.optim import optimizer as make_optimizer
from nestopt.train import engines
from nestopt.train.checkpoints.shards import ShardReader
from nestopt.train.engines import launch
from nestopt.train.objective import Objective
from nestopt.train.run import build_model

ENGINES: dict[str, dict[str, Any]] = {
    "zero1": {
        "engine": "deepspeed",
        "zero_stage": 1,
        # DeepSpeed takes buffers of that size whatever the model's
        "deepspeed": {"zero_optimization": {"reduce_bucket_size": 5_000_000, "allgather_bucket_size": 5_000_000}},
    },
    "fsdp2": {"engine": "fsdp2"},
}
SAVED, STEPS = 2, 5
"""Steps before the checkpoint, and in all."""


def run(setting: Setting) -> Iterator[Row]:
    rows: list[tuple[str, Callable[[], Row]]] = []
    for dtype in ("bfloat16", "float32"):
        label = f"{setting.part}, {dtype}"
        rows.append((label, functools.partial(_resumed, setting, label, dtype)))
    try:
        yield from attempts(setting, rows, need_s=2.0)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _config(setting: Setting, dtype: str, seed: int = 0) -> Config:
    size = (32, 2, 64, 97) if setting.tiny else (512, 4, 512, 8192)
    dim, blocks, window, vocab = size
    return Config.from_data(
        {
            "model": {
                "mixer": "deltanet",
                "mlp": {"level": "cms", "periods": [1]},
                "gate_output": False,
                "dim": dim,
                "blocks": blocks,
                "vocab": vocab,
                "tie": True,
            },
            "optimizer": {"stack": "muon"},
            "data": {"batch": 4, "window": window},
            "train": {"device": setting.device, "dtype": dtype, "seed": seed, **ENGINES[setting.part]},
        }
    )


def _start(setting: Setting) -> None:
    """The group of the one process, once; and kernels that give the same numbers each time they are run."""
    if ENGINES[setting.part]["engine"] == "deepspeed" and importlib.util.find_spec("deepspeed") is None:
        raise Missing("not installed: deepspeed")
    if dist.is_initialized():
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # which is about reading what nobody wrote
    launch.alone()
    if setting.cuda:
        torch.cuda.set_device(0)
    dist.init_process_group("nccl" if setting.cuda else "gloo")


@dataclasses.dataclass
class Run:
    """A model under an engine.

    Attributes:
        losses: of the steps taken.
        step_s: of the last.
    """

    setting: Setting
    config: Config
    losses: list[float] = dataclasses.field(default_factory=list)
    step_s: float = 0.0

    def __post_init__(self) -> None:
        self.engine = engines.make(self.config)
        self.lm = build_model(self.config).to(self.engine.device)
        self.engine.cut_up(self.lm)
        self.engine.attach(Objective(self.lm, "mixer"), self.lm, make_optimizer(self.lm, self.config))

    def steps(self, begin: int, end: int) -> None:
        for step in range(begin, end):
            shape = (self.config.data.batch, self.config.data.window + 1)
            tokens = torch.randint(self.config.model.vocab, shape, generator=generator(step)).to(self.engine.device)
            wait(self.setting)
            begun = time.perf_counter()
            loss, _ = self.engine.update([(tokens,)])
            wait(self.setting)
            self.step_s = time.perf_counter() - begun
            self.losses.append(float(loss))

    def weights(self, folder: Path) -> dict[str, Tensor]:
        """All of them, whole, apart from the model's own."""
        found = self.engine.checkpoints.whole_weights(folder)
        assert found is not None
        return {name: weight.detach().cpu().clone() for name, weight in found.items()}


def _resumed(setting: Setting, name: str, dtype: str) -> Row:
    """A run that goes on, and two that take up its checkpoint from other weights: all end at the same numbers."""
    _start(setting)
    folder = setting.scratch / name.replace(", ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    whole = Run(setting, _config(setting, dtype))
    whole.steps(0, SAVED)
    begun = time.perf_counter()
    whole.engine.checkpoints.save(folder, {"step": SAVED})
    saved_s = time.perf_counter() - begun
    whole.steps(SAVED, STEPS)
    wanted, losses, step_s = whole.weights(folder), whole.losses, whole.step_s
    del whole
    ends = []
    for seed in (1, 2):
        again = Run(setting, _config(setting, dtype, seed))
        begun = time.perf_counter()
        with ShardReader(folder) as parts:
            again.engine.checkpoints.load(parts)
            assert parts.meta["step"] == SAVED
        loaded_s = time.perf_counter() - begun
        again.steps(SAVED, STEPS)
        ends.append((again.weights(folder), again.losses))
        del again
    values = {"step, ms": 1e3 * step_s, "save, s": saved_s, "load, s": loaded_s, "loss": losses[-1]}
    same = [_same(wanted, found) and losses[SAVED:] == lost for found, lost in ends]
    if all(same):
        return Row(name, "passed", values=values)
    alike = "agree with each other" if _same(ends[0][0], ends[1][0]) else "differ from each other too"
    error = max(error_of(ends[0][0][key], weight) for key, weight in wanted.items())
    return Row(name, "failed", f"resumed runs differ by {error:.2g}; two of them {alike}", values)


def _same(some: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return some.keys() == others.keys() and all(torch.equal(some[key], others[key]) for key in some)
