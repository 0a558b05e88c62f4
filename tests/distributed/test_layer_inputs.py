"""Levels that look at layers' inputs under a plain DistributedDataParallel: steps are those of one process."""

from __future__ import annotations

import contextlib
import copy
import os
import socket
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

import nestopt
from nestopt.core.level import Level
from nestopt.levels import dgd, ggd, momentum
from nestopt.optim import Nested
from tests.optim.watched import Cubic

pytestmark = pytest.mark.distributed

LEVELS = [
    dgd(momentum()),
    dgd(mode="paper"),
    dgd(solver="exact", normalize_inputs=True, mode="paper"),
    ggd(),
    ggd(Cubic()),
]
STEPS = 6


class Branches(nn.Module):
    """`b` is used by one process, `never` by none."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.never, self.c = (nn.Linear(6, n) for n in (6, 6, 6, 2))

    def forward(self, x: Tensor, b: bool) -> Tensor:
        h = torch.tanh(self.a(x))
        return self.c(h + self.b(h) if b else h)


def batch(step: int, rank: int, part: int = 0) -> Tensor:
    return torch.randn(2, 2, 7, 6, generator=torch.Generator().manual_seed(step))[rank, part]


def optimizer(model: nn.Module, level: Level, period: int) -> Nested:
    return nestopt.optimizer(model, level, 0.02, groups=[{"match": "weight", "period": period}], on_nonfinite="skip")


def uses_b(step: int, rank: int) -> bool:
    return rank == step % 2


def alone(level: Level, period: int, parts: int) -> Tensor:
    model = Branches()
    own = optimizer(model, level, period)
    own.tell_loss_scale(1 / (2 * parts))
    for step in range(STEPS):
        own.zero_grad()
        for rank in range(2):
            for part in range(parts):
                (model(batch(step, rank, part), uses_b(step, rank)).square().mean() / 2 / parts).backward()
        own.step()
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def together(rank: int, level: Level, period: int, parts: int, view: bool, wrapped_first: bool) -> Tensor:
    model = Branches()
    if not wrapped_first:
        own = optimizer(model, level, period)
    ddp = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True, gradient_as_bucket_view=view)
    if wrapped_first:
        own = optimizer(ddp, level, period)
    own.tell_loss_scale(1 / parts)
    for step in range(STEPS):
        if step == 3:  # in the middle of a period: what the first process saved goes on in both
            saved = [copy.deepcopy(own.state_dict()) if rank == 0 else None]
            dist.broadcast_object_list(saved)
            own = optimizer(ddp if wrapped_first else model, level, period)
            own.load_state_dict(saved[0])
            own.tell_loss_scale(1 / parts)
        if step in (1, 4):  # a step that is skipped by both, as both have the infinity of one
            (ddp(5 * batch(step, rank), uses_b(step + 1, rank)).sum() * (float("inf") if rank else 1)).backward()
            own.step()
            ddp.zero_grad()
        x = batch(step, rank).requires_grad_()
        torch.autograd.grad(model(x, True).sum(), x)
        for part in range(parts):
            with contextlib.nullcontext() if part == parts - 1 else ddp.no_sync():
                (ddp(batch(step, rank, part), uses_b(step, rank)).square().mean() / parts).backward()
        own.step()
        ddp.zero_grad()
    return nn.utils.parameters_to_vector(model.parameters()).detach()


def compare(rank: int, port: int) -> None:
    """In a process of its own."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    for level in LEVELS:
        for period, parts, view, wrapped_first in [(1, 1, True, False), (2, 2, False, True), (2, 1, True, True)]:
            mine = together(rank, level, period, parts, view, wrapped_first)
            both = [torch.empty_like(mine) for _ in range(2)]
            dist.all_gather(both, mine)
            assert torch.equal(*both), f"{level}, period {period}: the processes drift apart"
            torch.testing.assert_close(mine, alone(level, period, parts), rtol=1e-4, atol=1e-5)
    trains_by_itself(rank)
    differs(rank)
    dist.barrier()
    dist.destroy_process_group()


def trains_by_itself(rank: int) -> None:
    """A process with a group of its own takes nobody's inputs."""
    groups = [dist.new_group([each]) for each in range(2)]
    model, twin = nn.Linear(6, 2), nn.Linear(6, 2)
    twin.load_state_dict(model.state_dict())
    own, other = nestopt.optim.DGD([model.weight], 0.1), nestopt.optim.DGD([twin.weight], 0.1)
    own.watch(model, group=groups[rank])
    other.watch(twin, group=groups[rank])
    for net, stepped in ((model, own), (twin, other)):
        net(batch(0, rank)).square().mean().backward()
        if rank == 0 or stepped is own:
            stepped.step()
    assert torch.equal(model.weight, twin.weight) == (rank == 0)


def differs(rank: int) -> None:
    """Processes that train other models can't be added up."""
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(2 + rank)))
    own = nestopt.optim.DGD([layer.weight for layer in model], 0.1, model)
    model(batch(0, rank)).sum().backward()
    with pytest.raises(RuntimeError, match=r"process . watches the inputs of . layers .* watch\(model, group=…\)"):
        own.step()


def test_steps_are_those_of_one_process() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(compare, (port,), nprocs=2)
