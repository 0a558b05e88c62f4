"""How the work of a step is shared: one process, or several under `torchrun`."""

from __future__ import annotations

import os
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nestopt.config import Config, ConfigError
from nestopt.optim import Nested
from nestopt.train import snapshot

Packed = tuple[dict[str, Tensor], dict[str, Any]]


class Engine:
    """One process. Others override what differs.

    Attributes:
        rank, world: this process's number and how many there are.
        device: where the model is.
    """

    name: ClassVar[str] = "single"
    rank: int = 0
    world: int = 1

    def __init__(self, config: Config) -> None:
        self.config = config
        self.device = _device(config.train.device)
        if config.train.threads:
            torch.set_num_threads(config.train.threads)

    def attach(self, model: nn.Module, optimizer: Nested) -> None:
        """Take the model (on the device already) and its optimizer."""
        self.module, self.optimizer = model, optimizer
        self.model: nn.Module = model

    def update(self, loss: Tensor) -> Tensor:
        """Gradients, clipping and the optimizer's step; returns the norm of the whole gradient, before clipping."""
        self.optimizer.zero_grad()
        loss.backward()
        clip = self.config.train.clip
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), float("inf") if clip is None else clip)
        self.optimizer.step()
        return norm

    def total(self, value: Tensor) -> Tensor:
        """The sum of `value` over processes."""
        return value

    def mean(self, value: Tensor) -> Tensor:
        return self.total(value.detach().clone()) / self.world

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set in any process: all of them get the same answer."""
        return flag

    def wait(self) -> None:
        """Until all processes are here."""

    def pack(self) -> Packed:
        """Model and optimizer, for the checkpoint that this process writes."""
        return snapshot.pack(self.module, self.optimizer)

    def unpack(self, packed: Packed) -> None:
        """Put back what `pack` gave."""
        snapshot.unpack(self.module, self.optimizer, packed)

    @property
    def files(self) -> int:
        """How many files a checkpoint has: the first so many processes write one each."""
        return 1

    def close(self) -> None:
        """Leave the group of processes."""


class Ddp(Engine):
    """Each process has the whole model and a slice of the batch; gradients are averaged (DistributedDataParallel)."""

    name: ClassVar[str] = "ddp"

    def __init__(self, config: Config) -> None:
        if "RANK" not in os.environ:
            raise ConfigError.refuse(
                "train.engine",
                self.name,
                f"start it with `torchrun --nproc-per-node N -m nestopt train … train.engine={self.name}`",
            )
        super().__init__(config)
        self._begun = not dist.is_initialized()  # else the caller's group of processes is used, and left as it is
        self._initialise()
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        if self.device.type == "cuda":
            self.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(self.device)
        if config.data.batch % self.world:
            self.close()
            raise ConfigError.refuse("data.batch", config.data.batch, f"give a multiple of the {self.world} processes")

    def _initialise(self) -> None:
        if self._begun:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")

    def attach(self, model: nn.Module, optimizer: Nested) -> None:
        super().attach(model, optimizer)
        self.model = nn.parallel.DistributedDataParallel(model)

    def total(self, value: Tensor) -> Tensor:
        dist.all_reduce(value)
        return value

    def any(self, flag: bool) -> bool:
        seen = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(seen, dist.ReduceOp.MAX)
        return bool(seen)

    def wait(self) -> None:
        dist.barrier()

    def close(self) -> None:
        if self._begun:
            dist.barrier()
            dist.destroy_process_group()


def make(config: Config) -> Engine:
    """The engine that `train.engine` names."""
    if config.train.engine == "deepspeed":
        from nestopt.train.zero import DeepSpeed

        return DeepSpeed(config)
    if config.train.engine == "single" and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError.refuse(
            "train.engine", "single", f"{os.environ['WORLD_SIZE']} processes were started; give ddp or deepspeed"
        )
    return {"single": Engine, "ddp": Ddp}[config.train.engine](config)


def _device(name: str) -> torch.device:
    if name == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError.refuse(
            "train.device", name, f"this machine has no such device ({str(error).splitlines()[0]})"
        ) from None
    return device
