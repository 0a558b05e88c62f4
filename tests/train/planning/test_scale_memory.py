"""The plan of memory and work against what real steps on real tensors allocate and multiply."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from nestopt.config import Config
from nestopt.levels.gradient.m3 import M3
from nestopt.optim import optimizer as make_optimizer
from nestopt.optim.sharded import units
from nestopt.optim.sharded.slices import Slice
from nestopt.optim.sharded.units import Flat, Owned, Unit
from nestopt.train import engines
from nestopt.train.objective import Objective
from nestopt.train.planning import Sharing, scale
from nestopt.train.planning.parts import Parts
from nestopt.train.planning.passes import count_pass
from nestopt.train.planning.ranks import traffic
from nestopt.train.planning.scale import rank_memory
from nestopt.train.run import build_model

STATIC = {"mlp": {"level": "cms", "periods": [1]}, "gate_output": False}
TRANSFORMER = {"mixer": "attention", **STATIC}
HOPE = {
    "gate_output": False,
    "dim": 32,
    "blocks": 2,
    "heads": 2,
    "mixer": {"level": "self_modifying", "chunk": 16, "projection_chunk": 32},
    "mlp": {"level": "cms", "periods": [16, 32], "learn": "context", "teach": "loss", "through": "first_order"},
    "segment": 32,
}
RUNS: dict[str, dict[str, Any]] = {
    "hope in segments, m3, tied": {
        "model": {**HOPE, "tie": True},
        "data": {"batch": 2, "window": 64},
        "optimizer": {"stack": "m3"},
    },
    "transformer, m3: states count most": {
        "model": {**TRANSFORMER, "dim": 192, "blocks": 3, "heads": 4},  # from 256 on CPUs save on symmetric products
        "data": {"batch": 1, "window": 32},
        "optimizer": {"stack": "m3"},
    },
    "transformer, adamw": {
        "model": {**TRANSFORMER, "dim": 256, "blocks": 2, "heads": 4},
        "data": {"batch": 1, "window": 32},
        "optimizer": {"stack": "adamw"},
    },
    "transformer, muon: activations count most": {
        "model": {**TRANSFORMER, "dim": 64, "blocks": 4, "heads": 4},
        "data": {"batch": 4, "window": 256},
        "optimizer": {"stack": "muon"},
    },
    "deltanet, m3": {
        "model": {"dim": 128, "blocks": 2, "heads": 4, "mixer": "deltanet", **STATIC},
        "data": {"batch": 2, "window": 128},
        "optimizer": {"stack": "m3"},
    },
}
NARROW = {
    "transformer, muon, bfloat16": {**RUNS["transformer, muon: activations count most"], "train": {"dtype": "bfloat16"}}
}


def with_learning(run: dict[str, Any]) -> dict[str, Any]:
    """With MLPs that learn in training windows, too."""
    return {**run, "train": {"learn": "all", **run.get("train", {})}}


def allocated(run: Callable[[], object]) -> int:
    """The most that the allocator has given out at a time during `run`, beyond what it had before."""
    gc.collect()  # what is freed meanwhile must have been made meanwhile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        run()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def steps(config: Config, count: int) -> Callable[[], object]:
    """Real training by the engine of one process, from the making of the model on."""

    def run() -> object:
        engine = engines.make(config)
        model = build_model(config)
        engine.attach(Objective(model), model, make_optimizer(model, config))
        for _ in range(count):
            engine.update([(torch.randint(256, (config.data.batch, config.data.window + 1)),)])
        return engine

    return run


def marked(names: Iterable[str]) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow if name.startswith("hope") else ()) for name in names]


@pytest.mark.parametrize("name", marked([*RUNS, *NARROW]))
def test_memory_is_what_training_allocates(name: str) -> None:
    config = Config.from_data(with_learning({**RUNS, **NARROW}[name]))
    plan = scale(config, Sharing.of(config, 1), device="cpu")
    assert plan.memory.total == pytest.approx(allocated(steps(config, 2)), rel=0.1)


@pytest.mark.parametrize("name", marked(RUNS))
def test_operations_are_those_of_training(name: str) -> None:
    config = Config.from_data(with_learning(RUNS[name]))
    plan = scale(config, Sharing.of(config, 1), device="cpu")
    model = build_model(config)
    optimizer = make_optimizer(model, config)
    with FlopCounterMode(display=False, custom_mapping=_ON_CPU) as counter:
        model.loss(torch.randint(256, (config.data.batch, config.data.window + 1)))[0].backward()
    assert plan.passes.flops == pytest.approx(counter.get_total_flops(), rel=0.05)
    with FlopCounterMode(display=False, custom_mapping=_ON_CPU) as counter:
        for _ in range(M3().slow_period):
            optimizer.step()
    assert plan.step.flops == pytest.approx(counter.get_total_flops() / M3().slow_period, rel=0.05)


def _forward(q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(q, k, v)


def _backward(grad: Any, q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(grad, q, k, v)


def _added_to(self: Any, a: Any, b: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * math.prod(a) * b[-1]


_ON_CPU = {
    torch.ops.aten.addmm_: _added_to,
    torch.ops.aten.baddbmm_: _added_to,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
}
"""Kernels that torch's counter does not know."""


# -- one of several processes ------------------------------------------------------------------------------------------

SPREAD = {
    "model": {"dim": 96, "blocks": 3, "heads": 4},
    "data": {"batch": 4, "window": 16},
    "optimizer": {"stack": "m3"},
}


@pytest.fixture
def processes() -> Iterator[Callable[[int, int], None]]:
    """Be one of several processes, the others of which do nothing: what is sent is made, what comes is whatever."""

    def begin(rank: int, world: int) -> None:
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)

    yield begin
    torch.distributed.destroy_process_group()


def own_step(config: Config, sharing: Sharing, rank: int) -> Callable[[], object]:
    """What one process holds and does after the backward pass: slices of all, its own tensors whole, and their steps.

    Slices are cut from real tensors of the model; the units that every engine runs step them.
    """
    parts, nested = Parts.of(config), make_optimizer(build_model(config), config)
    owner = parts.owners(sharing.world)
    model = {name: param.detach() for group in nested.param_groups for name, param in _named(group)}

    def run() -> object:
        masters = {name: _sliced(param, sharing, rank).float() for name, param in model.items()}
        gradients = {name: _sliced(param, sharing, rank).to(sharing.dtype) for name, param in model.items()}
        made: list[Unit] = []
        for group in nested.param_groups:
            own = [masters[name] for name, _ in _named(group)]
            tables = [_table(group, sharing, r) for r in range(sharing.world)]
            if nested.level(group).is_elementwise:
                made.append(Flat(nested, group, own, tables[rank]))
            else:
                made.append(Owned(nested, group, own, tables, owner, torch.distributed.group.WORLD, 0))
        for _ in range(2):
            wide = {name: slice_.to(torch.float32, copy=True) for name, slice_ in gradients.items()}
            for unit, group in zip(made, nested.param_groups, strict=True):
                unit.step([wide[name] for name, _ in _named(group)], group, {})
            del wide
        return made, gradients

    return run


def _named(group: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    return zip(group["param_names"], group["params"], strict=True)


def _sliced(tensor: Tensor, sharing: Sharing, rank: int) -> Tensor:
    size = -(-tensor.numel() // sharing.world)
    return tensor.flatten()[rank * size : (rank + 1) * size].clone()


def _table(group: dict[str, Any], sharing: Sharing, rank: int) -> list[Slice]:
    found = []
    for i, (name, param) in enumerate(_named(group)):
        size = -(-param.numel() // sharing.world)
        start = min(rank * size, param.numel())
        found.append(Slice(name, tuple(param.shape), start, min(size, param.numel() - start), i))
    return found


@pytest.mark.parametrize("limit", [units.LIMIT, 40_000], ids=["at once", "in rounds"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rank", [0, 2])
def test_an_owner_needs_what_is_planned(
    processes: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch, rank: int, dtype: str, limit: int
) -> None:
    monkeypatch.setattr(units, "LIMIT", limit)
    config = Config.from_data({**SPREAD, "train": {"dtype": dtype}})
    sharing = Sharing.of(config, 4, "deepspeed", 2)
    parts, rows = Parts.of(config), config.data.batch // sharing.world
    processes(rank, sharing.world)
    counted = count_pass(config.model, rows, config.data.window, dtype=sharing.dtype, device="cpu")
    memory = rank_memory(parts, counted, sharing, parts.owners(sharing.world), rank)
    assert memory.in_step - memory.weights - memory.buffers == pytest.approx(
        allocated(own_step(config, sharing, rank)), rel=0.1
    )


@pytest.mark.parametrize("rank", [0, 3])
def test_a_process_sends_what_is_planned(processes: Callable[[int, int], None], rank: int) -> None:
    config = Config.from_data(SPREAD)
    sharing = Sharing.of(config, 4, "deepspeed", 2)
    processes(rank, sharing.world)
    parts, nested = Parts.of(config), make_optimizer(build_model(config), config)
    owner = parts.owners(sharing.world)
    sent = 0
    for group in nested.param_groups:
        if not nested.level(group).is_elementwise:
            own = [_sliced(param.detach(), sharing, rank) for _, param in _named(group)]
            tables = [_table(group, sharing, r) for r in range(sharing.world)]
            unit = Owned(nested, group, own, tables, owner, torch.distributed.group.WORLD, 0)
            sent += sum(now.exchange.sent for now in unit.rounds)
    planned, _ = traffic({name: parts.shapes[name].numel() for name in owner}, owner, sharing)
    assert 4 * sent == planned[rank] > 0
