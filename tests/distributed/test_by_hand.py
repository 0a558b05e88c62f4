"""`fully_shard` by hand: optimizers on DTensors take one process's steps, or say what to do."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

import nestopt
from nestopt.core import chain, nest
from nestopt.levels import adam, gd, momentum, muon, weight_average

pytestmark = pytest.mark.distributed

STACKS: dict[str, Any] = {
    "gd": "gd",
    "adamw": "adamw",
    "second_moment": "second_moment",
    "three": chain(momentum(0.5, period=2), adam(), momentum(0.9)),
    "muon": "muon",
    "m3": {"level": "m3", "slow_period": 2},
    "shampoo": "shampoo",
    "delta_momentum": "delta_momentum",
    "deep_momentum": "deep_momentum",
    "lookahead": nest(gd(), chain(momentum(0.5), adam()), of="weights", period=3),
    "slow muon": nest(momentum(0.5), muon(), of="weights", period=3, step_size=0.7),
    "average": weight_average(adam(), 0.5),
    "schedule_free": "schedule_free",
}
ENTRYWISE = ("gd", "adamw", "second_moment", "three", "lookahead", "average")
AVERAGED = ("lookahead", "slow muon", "average", "schedule_free")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Net(nn.Module):
    """Uneven rows, fewer rows than processes, and a layer that no batch reaches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.thin = nn.Linear(6, 5), nn.Linear(5, 6), nn.Linear(6, 1)
        self.never, self.out = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.b(torch.tanh(self.a(x)))
        return self.out(hidden * torch.sigmoid(self.thin(hidden)))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, dtype: torch.dtype, steps: range) -> None:
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for step in steps:
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step)).to(dtype)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        schedule.step()


def made(stack: Any, dtype: torch.dtype, mesh: Any = None) -> tuple[Net, Any]:
    from torch.distributed.fsdp import fully_shard

    model = Net().to(dtype)
    if mesh is not None:
        fully_shard(model, mesh=mesh)
    torch.manual_seed(1)  # of what starts at random
    return model, nestopt.optimizer(model, stack, lr=0.02, weight_decay=0.1, rest={"stack": "adamw", "lr": 0.02})


def weights(model: nn.Module) -> list[Tensor]:
    return [getattr(p.detach(), "full_tensor", p.detach().clone)().float() for p in model.parameters()]


def work(rank: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    from torch.distributed.device_mesh import init_device_mesh

    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    mesh, found = init_device_mesh("cpu", (2,)), {}
    for name, stack in STACKS.items():
        for kind, dtype in DTYPES.items():
            model, optimizer = made(stack, dtype, mesh)
            try:
                train(model, optimizer, dtype, range(4))
                found["as it is", name, kind] = weights(model)
            except RuntimeError as error:
                found["as it is", name, kind] = str(error)
            model, optimizer = made(stack, dtype, mesh)
            own = nestopt.optim.shard(optimizer, mesh)
            train(model, own, dtype, range(4))
            found["sharded", name, kind] = weights(model)
            own.eval()
            found["evaluated", name, kind] = weights(model)
            with torch.no_grad():
                model(torch.ones(2, 6, dtype=dtype))
            own.train()
            found["again", name, kind] = weights(model)
            train(model, own, dtype, range(4, 6))
            found["on", name, kind] = weights(model)
    # saved and loaded, each process its own
    model, optimizer = made(STACKS["three"], torch.float32, mesh)
    train(model, optimizer, torch.float32, range(2))
    other, loaded = made(STACKS["three"], torch.float32, mesh)
    other.load_state_dict(model.state_dict())
    loaded.load_state_dict(optimizer.state_dict())
    for each, own in ((model, optimizer), (other, loaded)):
        train(each, own, torch.float32, range(2, 4))
    found["resumed"] = weights(model), weights(other)
    for label, wrong in {
        "two dimensions": init_device_mesh("cpu", (2, 1)),
        "another": init_device_mesh("cpu", (2,)),
    }.items():
        try:
            plain = label == "another"
            nestopt.optim.shard(
                nestopt.optimizer(Net() if plain else made("muon", torch.float32, mesh)[0], "muon"), wrong
            )
        except ValueError as error:
            found["refused", label] = str(error)
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    folder: Path = tmp_path_factory.mktemp("by_hand")
    mp.spawn(work, (str(folder),), 2)
    return torch.load(folder / "found.pt", weights_only=True)


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("name", STACKS)
def test_a_sharded_optimizer_takes_one_processs_steps(found: dict[Any, Any], name: str, kind: str) -> None:
    model, optimizer = made(STACKS[name], DTYPES[kind])
    train(model, optimizer, DTYPES[kind], range(4))
    tolerance = 1e-5 if kind == "float32" else 2e-2
    for a, b in zip(found["sharded", name, kind], weights(model), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    as_it_is = found["as it is", name, kind]
    if name in ENTRYWISE:
        for a, b in zip(as_it_is, weights(model), strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    else:
        label = nestopt.config.build("level", STACKS[name]).label
        assert as_it_is.startswith("a.weight lies over several processes (a DTensor), and " + label)
        assert "nestopt.optim.shard(optimizer, mesh)" in as_it_is


@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("name", STACKS)
def test_a_sharded_model_is_evaluated_as_a_whole_one(found: dict[Any, Any], name: str, kind: str) -> None:
    model, optimizer = made(STACKS[name], DTYPES[kind])
    train(model, optimizer, DTYPES[kind], range(4))
    optimizer.eval()
    tolerance = 1e-5 if kind == "float32" else 2e-2
    for a, b in zip(found["evaluated", name, kind], weights(model), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    optimizer.train()
    train(model, optimizer, DTYPES[kind], range(4, 6))
    for a, b in zip(found["on", name, kind], weights(model), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    trained = found["sharded", name, kind]
    assert all(map(torch.equal, found["again", name, kind], trained))
    assert (not all(map(torch.equal, found["evaluated", name, kind], trained))) == (name in AVERAGED)


def test_state_on_dtensors_is_saved_and_loaded(found: dict[Any, Any]) -> None:
    assert all(map(torch.equal, *found["resumed"]))


def test_another_mesh_and_plain_tensors_are_refused(found: dict[Any, Any]) -> None:
    assert "mesh has 2 dimensions" in found["refused", "two dimensions"]
    assert "a.weight is not a DTensor" in found["refused", "another"]
