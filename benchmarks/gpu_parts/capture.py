"""Every capturable stack in a CUDA graph, against the same steps taken one by one.

A graph that is replayed runs the kernels that were captured, so the numbers are the same bit for bit, unless a library
chooses another kernel under capture; a difference is shown, and has a bound.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import nestopt
from benchmarks.gpu_parts.optimizers import Small
from benchmarks.gpu_parts.setting import NO_CUDA, Row, Setting, attempts, error_of, generator
from benchmarks.gpu_parts.waits import NOT_STACKS, WAIT

FIRST, LATER = 2, 5
"""Steps before the capture, and after it."""
BOUND = 1e-5
"""Of what differs between the two, by root mean square; nothing should."""

INPUTS = {"dgd", "ggd"}
REFUSED = {*INPUTS, "window_attention", "schedule_free", "weight_average"}
"""Levels that a capturable optimizer must refuse: they need layers' inputs, grow, or count updates on the host."""
MAY_BE_REFUSED = WAIT
"""Levels that wait for the device, which no capture allows. On a CPU their steps run."""

STACKS: Mapping[str, Any] = {
    **{name: name for name in nestopt.levels.list() if name not in NOT_STACKS | MAY_BE_REFUSED},
    "momentum, adam, momentum": ["momentum", "adam", "momentum"],
    "two clocks": {"level": "parallel", "levels": ["muon", {"level": "muon", "period": 3}]},
    "nest": {"level": "nest", "outer": "delta_momentum", "inner": "momentum"},
    **{name: name for name in sorted(MAY_BE_REFUSED)},  # last: a capture that fails may trouble those after it
}


def run(setting: Setting) -> Iterator[Row]:
    rows: list[tuple[str, Callable[[], Row]]] = [
        (name, functools.partial(_captured, setting, name, functools.partial(_class, name)))
        for name in ("AdamW", "Adam")
    ]
    for name, spec in STACKS.items():
        make = functools.partial(nestopt.optimizer, spec=spec, lr=1e-2, capturable=True)
        rows.append((f"stack {name}", functools.partial(_captured, setting, f"stack {name}", make)))
    yield from attempts(setting, rows)


def _class(name: str, model: nn.Module) -> Any:
    return getattr(nestopt.optim, name)(model.parameters(), lr=1e-2, capturable=True)


def _captured(setting: Setting, name: str, make: Callable[[nn.Module], Any]) -> Row:
    level = name.removeprefix("stack ")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = Small().to(setting.device)
    model, gradients = copy.deepcopy(plain), _gradients(setting, plain)
    try:
        stepped = _stepped(plain, make, gradients)
        if not setting.cuda:
            return Row(name, "skipped", f"{NO_CUDA}; the steps ran")
        replayed = _replayed(model, make, gradients)
    except ValueError as refused:
        if level in REFUSED:
            return Row(name, "passed", f"refused: {refused}")
        if level in MAY_BE_REFUSED:
            return Row(name, "skipped", f"refused: {refused}")
        raise
    if level in REFUSED:
        return Row(name, "failed", "it was captured, and should have been refused")
    if all(torch.equal(a, b) for a, b in zip(stepped, replayed, strict=True)):
        return Row(name, "passed")
    errors = [error_of(b, a) for a, b in zip(stepped, replayed, strict=True)]
    return Row.of(name, max(errors), BOUND, "not bit for bit")


def _gradients(setting: Setting, model: nn.Module) -> list[list[Tensor]]:
    random = generator(1)
    shapes = [param.shape for param in model.parameters()]
    return [[torch.randn(s, generator=random).to(setting.device) for s in shapes] for _ in range(FIRST + LATER)]


def _begun(model: nn.Module, make: Callable[[nn.Module], Any]) -> Any:
    """An optimizer whose gradients stay in the same tensors, as a graph needs them."""
    torch.manual_seed(1)  # of memories that start at random, at the first step
    optimizer = make(model)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    return optimizer


def _fill(model: nn.Module, grads: Sequence[Tensor]) -> None:
    for param, grad in zip(model.parameters(), grads, strict=True):
        assert param.grad is not None
        param.grad.copy_(grad)


def _stepped(model: nn.Module, make: Callable[[nn.Module], Any], gradients: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    optimizer = _begun(model, make)
    for grads in gradients:
        _fill(model, grads)
        optimizer.step()
    return [param.detach() for param in model.parameters()]


def _replayed(
    model: nn.Module, make: Callable[[nn.Module], Any], gradients: Sequence[Sequence[Tensor]]
) -> list[Tensor]:
    """As torch says: first steps on a stream of their own, one captured, which is not run, and the rest replayed."""
    optimizer = _begun(model, make)
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for grads in gradients[:FIRST]:
            _fill(model, grads)
            optimizer.step()
    torch.cuda.current_stream().wait_stream(aside)
    graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            optimizer.step()
    finally:
        torch.cuda.set_stream(before)  # a capture that fails may leave its own
    for grads in gradients[FIRST:]:
        _fill(model, grads)
        graph.replay()
    torch.cuda.synchronize()
    return [param.detach() for param in model.parameters()]
