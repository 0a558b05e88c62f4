"""Train in several processes, each with the whole model: DistributedDataParallel."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nestopt.config import Config, ConfigError
from nestopt.core.device import by_contract
from nestopt.nn import CMS
from nestopt.train.engines import launch, peers
from nestopt.train.engines.engine import Engine

log = logging.getLogger("nestopt")


class Ddp(Engine):
    """Each process has the whole model and a slice of the batch; gradients are averaged (DistributedDataParallel)."""

    name: ClassVar[str] = "ddp"

    def __init__(self, config: Config) -> None:
        launch.hush()
        launch.prepare()
        if launch.processes() == 1 and "RANK" not in os.environ:
            log.warning(
                "train.engine=%s runs in one process; torchrun --nproc-per-node N -m nestopt train … starts several",
                self.name,
            )
            launch.alone()
        super().__init__(config)
        self._begun = not dist.is_initialized()  # else the caller's group of processes is used, and left as it is
        self._initialise()
        self.rank, self.world, self.comm = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
        if self.device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self.device)
        shares = self.world * config.train.accumulate
        if config.data.batch % shares:
            self.abandon()
            what = f"{self.world} processes"
            if config.train.accumulate > 1:
                what += f" times train.accumulate={config.train.accumulate}"
            raise ConfigError.refuse("data.batch", config.data.batch, f"give a multiple of the {what}")

    def _initialise(self) -> None:
        if self._begun:
            limit = self.config.train.timeout
            dist.init_process_group(
                "nccl" if self.device.type == "cuda" else "gloo",
                timeout=None if limit is None else timedelta(seconds=limit),
                **peers.present().group_options(),
            )

    def _wrapped(self, objective: nn.Module) -> nn.Module:
        # a batch without a write does not reach what says how far a write goes
        writes = any(isinstance(module, CMS) and module.learns for module in objective.modules())
        return nn.parallel.DistributedDataParallel(objective, find_unused_parameters=writes)

    @contextlib.contextmanager
    def _together(self, last: bool) -> Iterator[None]:
        # gradients that are added up in float32 copies are averaged before they go there
        with contextlib.nullcontext() if last or self._masters else self.model.no_sync():  # type: ignore[operator]
            yield

    def total(self, value: Tensor) -> Tensor:
        dist.all_reduce(value)
        return value

    def any(self, flag: bool) -> bool:
        seen = torch.full((), float(flag), device=self.device)
        dist.all_reduce(seen, dist.ReduceOp.MAX)
        with by_contract("agree"):
            return bool(seen)

    def agreed(self, seconds: float) -> float:
        with by_contract("agree"):
            return float(self.mean(torch.full((), seconds, dtype=torch.float64, device=self.device)))

    def gathered(self, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value)
        return found

    def wait(self) -> None:
        dist.barrier()

    def close(self) -> None:
        if self._begun:
            dist.barrier()
            dist.destroy_process_group()

    def abandon(self) -> None:
        # a group of several may wait for those that have not failed; it ends with its processes
        if self._begun and dist.get_world_size() == 1:
            dist.destroy_process_group()
