"""DiLoCo: processes that each train a whole model by themselves, and exchange weights at outer steps alone."""

from __future__ import annotations

import copy
import os
import re
import socket
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import nestopt
from nestopt import nest
from nestopt.levels import adamw, gd, momentum, muon
from nestopt.optim import Nested

pytestmark = pytest.mark.distributed

PERIOD, STEPS, LR = 3, 10, 0.02
DILOCO = nest(momentum(0.9, nesterov=True), adamw(), of="weights", period=PERIOD, step_size=0.7, across_processes=True)


class Traffic(TorchDispatchMode):
    """Note the name and the bytes of every collective."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.seen.append((func._opname, sum(x.nbytes for x in args[0] if isinstance(x, Tensor))))
        return func(*args, **(kwargs or {}))


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def gradients(model: nn.Module, step: int, rank: int) -> None:
    model.zero_grad()
    x = torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)[rank]
    model(x).square().mean().backward()


def flat(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def diloco() -> list[Tensor]:
    """Douillard et al. 2023, algorithm 1, with two workers in one process; the weights of both."""
    workers = [net(), net()]
    inner = [torch.optim.AdamW(w.parameters(), lr=LR, weight_decay=0.01) for w in workers]
    theta, m = flat(workers[0]), 0.0
    for step in range(STEPS):
        for rank, (worker, optimizer) in enumerate(zip(workers, inner, strict=True)):
            gradients(worker, step, rank)
            optimizer.step()
        if (step + 1) % PERIOD == 0:
            delta = sum(theta - flat(worker) for worker in workers) / 2
            m = 0.9 * m + delta
            theta = theta - 0.7 * (delta + 0.9 * m)
            for worker in workers:
                nn.utils.vector_to_parameters(theta.clone(), worker.parameters())
    return [flat(worker) for worker in workers]


def is_the_papers_loop(rank: int) -> None:
    model = net()
    optimizer = nestopt.optimizer(model, DILOCO, LR)
    for step in range(STEPS):
        if step == 4:  # in the middle of a period each process goes on from its own
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
            model = net(1)
            optimizer = nestopt.optimizer(model, DILOCO, LR)
            model.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
        gradients(model, step, rank)
        with Traffic() as traffic:
            optimizer.step()
        weights = sum(param.nbytes for param in model.parameters())
        outer = (step + 1) % PERIOD == 0
        assert traffic.seen == ([("allreduce_", 32), ("allreduce_", weights)] if outer else []), traffic.seen
    torch.testing.assert_close(flat(model), diloco()[rank], rtol=1e-11, atol=1e-13)


def matrices_and_the_rest(rank: int) -> None:
    """A level for matrices inside, another for the rest: both are averaged, and in float32."""
    model = net().float()
    optimizer = nestopt.optimizer(model, nest(gd(), muon(), of="weights", period=2, across_processes=True), LR)
    for step in range(4):
        model.zero_grad()
        model(torch.randn(9, 6, generator=torch.Generator().manual_seed(2 * step + rank))).square().mean().backward()
        optimizer.step()
        mine = flat(model)
        both = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(both, mine)
        assert torch.equal(*both) == (step % 2 == 1)


def averages_over_a_group(rank: int) -> None:
    """A process with a group of its own averages with nobody."""
    groups = [dist.new_group([each]) for each in range(2)]
    model, plain = net(), net()
    own = nestopt.optimizer(model, DILOCO, LR)
    own.average_over(groups[rank])
    alone = nestopt.optimizer(
        plain, nest(momentum(0.9, nesterov=True), adamw(), of="weights", period=PERIOD, step_size=0.7), LR
    )
    for step in range(4):
        for each, optimizer in ((model, own), (plain, alone)):
            gradients(each, step, rank)
            optimizer.step()
    assert torch.equal(flat(model), flat(plain))


def refused(rank: int) -> None:
    """Other models at the start, and a parameter without a gradient in one process, are errors in both."""
    model = net(seed=rank)
    optimizer = Nested(model.parameters(), DILOCO, LR)
    for step in range(PERIOD):
        gradients(model, step, rank)
        if step < PERIOD - 1:
            optimizer.step()
    with pytest.raises(RuntimeError, match="other slow weights"):
        optimizer.step()
    model = net()
    optimizer = Nested(model.parameters(), DILOCO, LR)
    for step in range(PERIOD):
        gradients(model, step, rank)
        if step < PERIOD - 1:
            optimizer.step()
    if rank:
        model[0].weight.grad = None
    with pytest.raises(RuntimeError, match=re.escape("with 23 to 53 numbers")):
        optimizer.step()


def compare(rank: int, port: int) -> None:
    """In a process of its own."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    is_the_papers_loop(rank)
    matrices_and_the_rest(rank)
    averages_over_a_group(rank)
    refused(rank)
    dist.barrier()
    dist.destroy_process_group()


def test_diloco() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(compare, (port,), nprocs=2)
