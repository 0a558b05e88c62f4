"""A step of many processes without any: hope-1.3b on 64."""

from __future__ import annotations

import pytest
import torch

from nestopt.config import Config, ConfigError
from nestopt.core.tree import leaves
from nestopt.optim.views import layout
from nestopt.train.planning import Sharing, Simulation, ranks_table, simulate
from nestopt.train.planning.parts import Parts
from nestopt.train.planning.ranks import traffic

WORLD = 64


@pytest.fixture(scope="module", params=["muon", "m3"])
def large(request: pytest.FixtureRequest) -> tuple[Parts, Simulation]:
    config = Config.from_data({"model": "hope-1.3b", "optimizer": {"stack": request.param}})
    return Parts.of(config), simulate(config, Sharing("deepspeed", 1, WORLD))


def check(parts: Parts, found: Simulation, world: int) -> None:
    matrices = {name for group in parts.groups if not group.level.is_elementwise for name in group.shapes}
    owned = [name for rank in found.ranks for name in rank.owned]
    assert sorted(owned) == sorted(matrices)  # each once
    assert not matrices & set(found.without)
    assert all(found.owner[name] == i for i, rank in enumerate(found.ranks) for name in rank.owned)
    assert sum(rank.sent for rank in found.ranks) == sum(rank.received for rank in found.ranks)
    whole = sum(parts.shapes[name].numel() for name in matrices)
    own_slices = sum(
        4 * Sharing("deepspeed", 1, world).part(parts.shapes[name].numel(), own) for name, own in found.owner.items()
    )
    assert sum(rank.sent for rank in found.ranks) == 3 * (4 * whole - own_slices)
    for group in parts.groups:
        if not group.level.is_elementwise:
            for name, shape in group.shapes.items():
                alone = layout(group.level, torch.empty(shape, device="meta"), group.view)
                kept = [rank.shapes[name] for rank in found.ranks if name in rank.shapes]
                assert kept == [{path: leaf.shape for path, leaf in leaves(alone)}]


@pytest.mark.slow
def test_hope_of_a_billion_on_64_processes(large: tuple[Parts, Simulation]) -> None:
    parts, found = large
    check(parts, found, WORLD)
    assert parts.numel == pytest.approx(1.3e9, rel=0.02)
    assert found.balance <= 1.1
    assert found.uneven("cost") == pytest.approx(found.balance)
    assert found.uneven("flops") <= 1.1
    assert found.uneven("sent") <= 1.1
    assert found.uneven("received") <= 1.15
    assert found.uneven("states") <= 1.2


def test_a_small_one_is_shared_by_the_same_rules() -> None:
    model = {"dim": 16, "blocks": 3, "heads": 2, "mixer": "deltanet"}
    config = Config.from_data({"model": model, "optimizer": {"stack": "m3"}, "data": {"window": 80}})
    parts = Parts.of(config)
    found = simulate(config, Sharing("deepspeed", 1, 5))
    check(parts, found, 5)
    assert found.balance == found.uneven("cost") < 1.5
    lines = ranks_table(found).splitlines()
    assert len(lines) == 2 + 5 + 1
    assert [line.split()[0] for line in lines[2:-1]] == ["0", "1", "2", "3", "4"]


def test_who_sends_what() -> None:
    sent, received = traffic({"w": 10}, {"w": 1}, Sharing("deepspeed", 1, 4))
    # slices of 3, 3, 3 and 1; the owner gets gradients and masters of 7, and gives masters back
    assert received == [12, 2 * 4 * 7, 12, 4]
    assert sent == [24, 4 * 7, 24, 8]


def test_what_nobody_owns_is_refused() -> None:
    with pytest.raises(ConfigError, match="--ranks: 'DDP' is not allowed; every process steps everything"):
        simulate(Config(), Sharing("ddp", 0, 4))
