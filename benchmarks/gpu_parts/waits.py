"""Forward, backward and step of every layer, and the step of every level as an optimizer, none of which may wait.

`torch.cuda.set_sync_debug_mode("error")` sees reads of single numbers, copies of pageable memory to the device, and
whatever else makes torch wait for it. Each is run once before, since what is made at a first call may take its time.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import nestopt
from benchmarks.gpu_parts.optimizers import ROOT_EVERY, Small
from benchmarks.gpu_parts.setting import NO_CUDA, Row, Setting, attempts, generator, no_waits

COMPOSITES = {"chain", "parallel", "nest"}
NOT_LAYERS = {"adamw", "dgd", "ftrl", "ggd", "lamb", "trust_ratio", "weight_decay", *COMPOSITES}
NOT_LAYERS |= {"schedule_free", "weight_average"}
"""Levels that can't run on tokens, and say so when a layer is made of them."""
NOT_STACKS = {"attention", "forgetting_attention", *COMPOSITES}
"""Likewise on gradients."""
WAIT = {"shampoo", "matrix_adagrad", "soap"}
"""Levels whose decompositions wait by contract: as optimizers at some steps, as layers at many tokens."""

LAYERS: Mapping[str, tuple[Any, dict[str, Any]]] = {
    **{name: (name, {}) for name in nestopt.levels.list() if name not in NOT_LAYERS | WAIT},
    "titans, chunks of 16, recomputed": ({"level": "titans", "chunk": 16}, {"checkpoint": 2}),
    "cms, in context": ({"level": "cms", "periods": [16, 32], "learn": "context", "teach": "local"}, {}),
    "cms, periods that the data choose": (
        {"level": "cms", "periods": [{"auto": 32, "every": 16}], "learn": "context", "teach": "local"},
        {},
    ),
}
"""By name: a spec, and options of `nestopt.layer`."""

STACKS: Mapping[str, Any] = {
    **{name: name for name in nestopt.levels.list() if name not in NOT_STACKS},
    "shampoo": {"level": "shampoo", "root_every": ROOT_EVERY},
    "matrix_adagrad": {"level": "matrix_adagrad", "root_every": ROOT_EVERY},
    "momentum, adam": ["momentum", "adam"],
    "two clocks": {"level": "parallel", "levels": ["muon", {"level": "muon", "period": 3}]},
}

QUIET = range(ROOT_EVERY + 2, 2 * ROOT_EVERY + 1)
"""Steps at which no root is made by those that `WAIT`."""

_HOPE = {"level": "cms", "periods": [32, 64], "learn": "context", "teach": "loss", "through": "first_order"}
MODELS: Mapping[str, dict[str, Any]] = {
    "transformer": {"mixer": "attention"},
    "deltanet": {"mixer": "deltanet"},
    "titans": {"mixer": {"level": "titans", "chunk": 16, "read": "chunk"}},
    "hope": {"mixer": {"level": "self_modifying", "chunk": 16, "projection_chunk": 32}, "mlp": _HOPE, "segment": 32},
}


def run(setting: Setting) -> Iterator[Row]:
    rows: list[tuple[str, Callable[[], Row]]] = []
    for name, (spec, options) in LAYERS.items():
        rows.append((f"layer {name}", functools.partial(_layer, setting, f"layer {name}", spec, options)))
    for name, section in MODELS.items():
        rows.append((f"model {name}", functools.partial(_model, setting, f"model {name}", section)))
    for name, spec in STACKS.items():
        rows.append((f"steps of {name}", functools.partial(_stack, setting, f"steps of {name}", spec)))
    yield from attempts(setting, rows)


def _seen(setting: Setting, name: str, *runs: Callable[[], None]) -> Row:
    """Each run once as it likes, and then without a wait; where none can be seen, once, which shows that it runs."""
    for run in runs:
        run()
        if setting.cuda:
            with no_waits(setting):
                run()
    return Row(name, "passed") if setting.cuda else Row(name, "skipped", NO_CUDA)


def _layer(setting: Setting, name: str, spec: Any, options: dict[str, Any]) -> Row:
    layer = _made(setting, lambda: nestopt.layer(spec, dim=32, heads=2, **options))
    x = torch.randn(2, 48, 32, generator=generator(0)).to(setting.device).requires_grad_()

    def train(x: Tensor) -> None:
        y, state = layer(x)
        y, _ = layer(y, state)
        y.square().sum().backward()

    def answer(x: Tensor) -> None:
        with torch.no_grad():
            _, state = layer(x)
            if hasattr(layer, "step"):
                for token in x[:, :3].unbind(1):
                    _, state = layer.step(token, state)

    return _seen(setting, name, lambda: train(x), lambda: answer(x))


def _model(setting: Setting, name: str, section: dict[str, Any]) -> Row:
    """Training as the loop does it, in bfloat16, and reading on from a state."""
    sizes: dict[str, Any] = {"vocab": 97, "dim": 32, "blocks": 2, "heads": 2}
    sizes |= {"mlp": {"level": "cms", "periods": [1]}, "gate_output": False}
    model = _made(setting, lambda: nestopt.model({**sizes, **section})).to(torch.bfloat16)
    tokens = torch.randint(97, (2, 65), generator=generator(0)).to(setting.device)

    def train() -> None:
        loss, _ = model.loss(tokens, learn="mixer")
        loss.backward()

    def read() -> None:
        with torch.no_grad():
            _, state = model(tokens[:, :-1])
            model(tokens[:, -1:], state)

    return _seen(setting, name, train, read)


def _stack(setting: Setting, name: str, spec: Any) -> Row:
    model = _made(setting, Small)
    optimizer = nestopt.optimizer(model, spec, lr=1e-3)
    tokens = torch.randint(61, (2, 16), generator=generator(0)).to(setting.device)
    for step in range(1, QUIET.stop):
        optimizer.zero_grad()
        model(tokens).square().mean().backward()
        with no_waits(setting) if step in QUIET else contextlib.nullcontext():
            optimizer.step()
    return Row(name, "passed") if setting.cuda else Row(name, "skipped", NO_CUDA)


def _made(setting: Setting, make: Callable[[], nn.Module]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().to(setting.device)
