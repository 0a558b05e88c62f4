"""FSDP2: weights, gradients and states are all cut up over the processes, as DTensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from nestopt.optim.sharded.dtensor import placements
from nestopt.optim.sharded.optimizer import Placement
from nestopt.train.engines.ddp import Ddp
from nestopt.train.engines.engine import LOW
from nestopt.train.engines.fsdp_methods import users


class Fsdp2(Ddp):
    """Each process has a share of the rows of every weight; blocks are put together as they are needed.

    In bfloat16, weights and what is kept of them by the optimizer are float32; what is put together is bfloat16.
    """

    name: ClassVar[str] = "fsdp2"
    cut: bool = True

    def cut_up(self, lm: nn.Module) -> None:
        mesh = init_device_mesh(self.device.type, (self.world,))
        policy = MixedPrecisionPolicy()
        dtype = getattr(torch, self.config.train.dtype)
        if dtype in LOW:
            # states are float32, and are among what modules are given
            policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
            lm.float()
        # what is put together at a time, the whole last
        parts = list(users(lm))
        if not any(part is lm for part, _ in parts):
            parts.append((lm, ()))
        for part, methods in parts:
            fully_shard(part, mesh=mesh, mp_policy=policy)
            for method in methods:
                register_fsdp_forward_method(part, method)

    def _leaves(self) -> Iterator[tuple[str, Tensor]]:
        # gradients come to the whole weights, which are made when they are first put together, and kept
        for part in self.lm.modules():
            if isinstance(part, FSDPModule):
                part.unshard()
                for name, param in self.lm.named_parameters():
                    if param.requires_grad and not isinstance(param, DTensor):
                        yield name, param
                part.reshard()

    def _wrapped(self, objective: nn.Module) -> nn.Module:
        return objective

    def _placements(self) -> list[Placement]:
        self._masters = []
        return placements(self.optimizer)

    @contextlib.contextmanager
    def _together(self, last: bool) -> Iterator[None]:
        yield  # gradients are added up in their slices: whole ones would take the memory that was to be saved

    def _clip(self) -> Tensor:
        norm = super()._clip()
        return norm.full_tensor() if isinstance(norm, DTensor) else norm
