"""Who holds what: how an engine spreads weights, gradients, states and masters over processes."""

from __future__ import annotations

import dataclasses
from typing import Literal, cast, get_args

import torch

from nestopt.config import Config, ConfigError
from nestopt.train.engines.deepspeed_settings import stage_of

Engine = Literal["single", "ddp", "fsdp2", "deepspeed"]

BUCKET = 500_000_000
"""Numbers that DeepSpeed puts together before it sends gradients: its `reduce_bucket_size`, if nothing else is set."""


@dataclasses.dataclass(frozen=True)
class Sharing:
    """How `world` processes, one to a GPU, share a run.

    Args:
        engine: `"single"`, `"ddp"`, `"fsdp2"` or `"deepspeed"`.
        stage: of DeepSpeed's ZeRO: from 1 on optimizer states and masters are spread, from 2 on gradients, at 3
            weights; 0 for other engines.
        world: processes, 1 or more.
        accumulate: micro-batches of each process in a step.
        dtype: of the weights that are computed with.

    Raises:
        ConfigError: what does not go together; names the flag or key.
    """

    engine: Engine = "single"
    stage: int = 0
    world: int = 1
    accumulate: int = 1
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if self.engine not in get_args(Engine):
            raise ConfigError.refuse("--engine", self.engine, f"give one of {', '.join(get_args(Engine))}")
        if self.world < 1:
            raise ConfigError.refuse("--gpus", self.world, "give a whole number, 1 or more")
        if self.stage not in (0, 1, 2, 3):
            raise ConfigError.refuse("--zero", self.stage, "give 0, 1, 2 or 3")
        if self.stage and self.engine != "deepspeed":
            raise ConfigError.refuse("--zero", self.stage, f"it needs --engine deepspeed, not {self.engine}")
        if self.engine == "single" and self.world > 1:
            raise ConfigError.refuse(
                "--gpus", self.world, "engine single is one process; give --engine ddp, fsdp2 or deepspeed"
            )

    @classmethod
    def of(cls, config: Config, world: int, engine: str | None = None, stage: int | None = None) -> Sharing:
        """Return what a configuration says, but for what is given; a ZeRO stage given alone means DeepSpeed."""
        train = config.train
        if engine is None:
            engine = train.engine if stage is None else "deepspeed"
        if stage is None:
            stage = 0
            if engine == train.engine:
                stage = stage_of(train.deepspeed or {}) if train.zero_stage is None else int(train.zero_stage)
        return cls(cast(Engine, engine), stage, world, train.accumulate, getattr(torch, train.dtype))

    @property
    def spreads_states(self) -> bool:
        """Whether a process keeps a slice of each tensor's states and masters (and owners have whole ones)."""
        return self.stage >= 1 or self.engine == "fsdp2"

    @property
    def spreads_gradients(self) -> bool:
        return self.stage >= 2 or self.engine == "fsdp2"

    @property
    def spreads_weights(self) -> bool:
        return self.stage >= 3 or self.engine == "fsdp2"

    @property
    def narrow(self) -> bool:
        """Whether weights are narrower than float32."""
        return self.dtype.itemsize < torch.float32.itemsize

    @property
    def has_masters(self) -> bool:
        """Whether float32 weights are kept for the optimizer: beside narrow ones, and by ZeRO 1 and up beside any."""
        return self.narrow or (self.engine == "deepspeed" and self.stage > 0)

    @property
    def stepped(self) -> torch.dtype:
        """The dtype of what the optimizer steps."""
        return torch.float32 if self.has_masters else self.dtype

    def part(self, numel: int, rank: int = 0) -> int:
        """Return how many numbers of a tensor of `numel` lie with a process; the last ones may have fewer."""
        size = -(-numel // self.world)
        return max(0, min(size, numel - rank * size))

    def __str__(self) -> str:
        named = {"single": "one process", "ddp": "DDP", "fsdp2": "FSDP2", "deepspeed": f"DeepSpeed ZeRO {self.stage}"}
        return named[self.engine]
