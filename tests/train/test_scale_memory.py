"""The plan of memory and work against what real steps on real tensors allocate and multiply."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from nestopt.config import Config
from nestopt.levels.m3 import M3
from nestopt.optim import Nested
from nestopt.optim import optimizer as make_optimizer
from nestopt.train.planning import Sharing, scale
from nestopt.train.planning.parts import Parts
from nestopt.train.planning.passes import count_pass
from nestopt.train.planning.scale import rank_memory
from nestopt.train.run import build_model

HOPE = {
    "dim": 32,
    "blocks": 2,
    "heads": 2,
    "mixer": {"level": "self_modifying", "chunk": 16, "projection_chunk": 32},
    "mlp": {"level": "cms", "periods": [16, 32], "learn": "context", "teach": "loss", "through": "first_order"},
    "segment": 32,
}
RUNS: dict[str, dict[str, Any]] = {
    "hope in segments, muon": {"model": HOPE, "data": {"batch": 2, "window": 96}, "optimizer": {"stack": "muon"}},
    "hope in segments, m3, tied": {
        "model": {**HOPE, "tie": True},
        "data": {"batch": 1, "window": 64},
        "optimizer": {"stack": "m3"},
    },
    "transformer, m3: states count most": {
        "model": {"dim": 192, "blocks": 3, "heads": 4},  # from 256 on CPUs save on symmetric products
        "data": {"batch": 1, "window": 32},
        "optimizer": {"stack": "m3"},
    },
    "transformer, adamw": {
        "model": {"dim": 256, "blocks": 2, "heads": 4},
        "data": {"batch": 1, "window": 32},
        "optimizer": {"stack": "adamw"},
    },
    "transformer, muon: activations count most": {
        "model": {"dim": 64, "blocks": 4, "heads": 4},
        "data": {"batch": 4, "window": 256},
        "optimizer": {"stack": "muon"},
    },
    "deltanet, m3": {
        "model": {"dim": 128, "blocks": 2, "heads": 4, "mixer": "deltanet"},
        "data": {"batch": 2, "window": 128},
        "optimizer": {"stack": "m3"},
    },
}
NARROW = {
    "transformer, muon, bfloat16": {**RUNS["transformer, muon: activations count most"], "train": {"dtype": "bfloat16"}}
}


def allocated(run: Callable[[], object]) -> int:
    """The most that the allocator has given out at a time during `run`, beyond what it had before."""
    gc.collect()  # what is freed meanwhile must have been made meanwhile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def steps(config: Config, count: int) -> Callable[[], nn.Module]:
    """Real training, from the making of the model on."""

    def run() -> nn.Module:
        model = build_model(config)
        optimizer = make_optimizer(model, config)
        for _ in range(count):
            optimizer.zero_grad()
            tokens = torch.randint(256, (config.data.batch, config.data.window + 1))
            model.loss(tokens)[0].backward()
            optimizer.step()
        return model

    return run


@pytest.mark.parametrize("name", [*RUNS, *NARROW])
def test_memory_is_what_training_allocates(name: str) -> None:
    config = Config.from_data({**RUNS, **NARROW}[name])
    plan = scale(config, Sharing.of(config, 1))
    assert plan.memory.total == pytest.approx(allocated(steps(config, 2)), rel=0.1)


@pytest.mark.parametrize("name", RUNS)
def test_operations_are_those_of_training(name: str) -> None:
    config = Config.from_data(RUNS[name])
    plan = scale(config, Sharing.of(config, 1))
    model = build_model(config)
    optimizer = make_optimizer(model, config)
    with FlopCounterMode(display=False, custom_mapping=_ON_CPU) as counter:
        model.loss(torch.randint(256, (config.data.batch, config.data.window + 1)))[0].backward()
    assert plan.pass_flops == pytest.approx(counter.get_total_flops(), rel=0.05)
    with FlopCounterMode(display=False, custom_mapping=_ON_CPU) as counter:
        for _ in range(M3().slow_period):
            optimizer.step()
    assert plan.step_flops == pytest.approx(counter.get_total_flops() / M3().slow_period, rel=0.05)


def _forward(q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_flop_count(q, k, v)


def _backward(grad: Any, q: Any, k: Any, v: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(grad, q, k, v)


_ON_CPU = {
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


def own_step(config: Config, sharing: Sharing, rank: int) -> Callable[[], object]:
    """What one process holds and does after the backward pass: slices of all, its own tensors whole, and their steps.

    Slices are cut from real tensors of the model, and the optimizer steps them for real, a few times over.
    """
    parts = Parts.of(config)
    owner = parts.owners(sharing.world)
    model = dict(build_model(config).named_parameters())

    def sliced(tensor: Tensor) -> Tensor:
        size = -(-tensor.numel() // sharing.world)
        return tensor.detach().flatten()[rank * size : (rank + 1) * size].to(torch.float32, copy=True)

    def run() -> object:
        masters = {name: sliced(param) for name, param in model.items()}
        gradients = {name: sliced(param).to(sharing.dtype) for name, param in model.items()}
        built: list[Nested] = []
        for step in range(2):
            wide = {name: slice_.to(torch.float32, copy=True) for name, slice_ in gradients.items()}
            sent = [wide[name].clone() for name in owner] + [masters[name].clone() for name in owner]
            mine = {name: nn.Parameter(model[name].detach().float().clone()) for name in owner if owner[name] == rank}
            for param in mine.values():
                param.grad = torch.randn_like(param)
            if step == 0:
                built += [_nested(parts, masters, mine)]
            else:  # the states stay, the tensors come anew
                for group in built[0].param_groups:
                    for name, param in zip(group["param_names"], group["params"], strict=True):
                        if name in mine:
                            param.data, param.grad = mine[name].data, mine[name].grad
            for group in built[0].param_groups:
                for name, param in zip(group["param_names"], group["params"], strict=True):
                    if name not in mine:
                        param.grad = wide[name]
            built[0].step()
            for group in built[0].param_groups:
                for name, param in zip(group["param_names"], group["params"], strict=True):
                    if name in mine:
                        param.data, param.grad = torch.empty(0), None
            del sent, wide, mine
        return built, gradients

    return run


def _nested(parts: Parts, slices: dict[str, Tensor], mine: dict[str, nn.Parameter]) -> Nested:
    groups: list[dict[str, Any]] = []
    for group in parts.groups:
        if group.level.is_entrywise:
            params: dict[str, nn.Parameter] = {name: nn.Parameter(slices[name]) for name in group.shapes}
        else:
            params = {name: mine[name] for name in group.shapes if name in mine}
        groups.append({**group.settings, "params": list(params.items())})
    return Nested(groups)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rank", [0, 2])
def test_an_owner_needs_what_is_planned(rank: int, dtype: str) -> None:
    config = Config.from_data({**SPREAD, "train": {"dtype": dtype}})
    sharing = Sharing.of(config, 4, "deepspeed", 2)
    parts, rows = Parts.of(config), config.data.batch // sharing.world
    counted = count_pass(config.model, rows, config.data.window, dtype=sharing.dtype)
    memory = rank_memory(parts, counted, sharing, parts.owners(sharing.world), rank)
    assert memory.in_step - memory.weights - memory.buffers == pytest.approx(
        allocated(own_step(config, sharing, rank)), rel=0.1
    )
