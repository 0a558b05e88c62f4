"""The peers: torch.optim, pytorch-optimizer, nested-learning and Keller Jordan's Muon."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.rows import Missing, Row, Stepper
from benchmarks.work import Work, cubic, elementwise, passes, quintic, shampoo

LR = 1e-4
SGD, ADAMW = "torch SGD-momentum fused", "torch AdamW fused"
MUON, MUON_FLOAT32 = "torch Muon", "torch Muon, in float32"
LION, SHAMPOO = "pytorch-optimizer Lion", "pytorch-optimizer Shampoo"
SHAMPOO_EVERY_10 = f"{SHAMPOO}, roots every 10"
MUON_WORK = Work(passes(3, 2), quintic(5), "bfloat16")
M3_BYTES = passes(6, 4)  # parameter, gradient, two momenta, second moment and the slow direction, which is only read

Build = Callable[[list[nn.Parameter]], Stepper]


def elementwise_rows() -> list[Row]:
    found = []
    for kind, how in (("loop", {"foreach": False}), ("foreach", {"foreach": True}), ("fused", {"fused": True})):
        sgd = functools.partial(torch.optim.SGD, lr=LR, momentum=0.9, **how)
        found.append(Row(f"torch SGD-momentum {kind}", sgd, elementwise(1)))
    for kind, how in (("loop", {"foreach": False}), ("foreach", {"foreach": True}), ("fused", {"fused": True})):
        found.append(Row(f"torch AdamW {kind}", functools.partial(torch.optim.AdamW, lr=LR, **how), elementwise(2)))
    return [
        *found,
        Row("pytorch-optimizer AdamW", _pytorch_optimizer("AdamW"), elementwise(2)),
        Row(LION, _pytorch_optimizer("Lion"), elementwise(1)),
        Row("nested-learning DeepMomentum", _DeepMomentum, elementwise(2)),
    ]


def matrix_rows() -> list[Row]:
    float32 = Work(MUON_WORK.bytes, MUON_WORK.flops, "float32")
    return [
        Row(ADAMW, functools.partial(torch.optim.AdamW, lr=LR, fused=True), elementwise(2)),
        Row(MUON, functools.partial(torch.optim.Muon, lr=LR), MUON_WORK),
        Row(MUON_FLOAT32, WideMuon, float32),
        Row("pytorch-optimizer Muon", _pytorch_optimizer_muon, MUON_WORK),
        Row("Keller Jordan's Muon", _keller_jordan, MUON_WORK),
        Row("nested-learning M3, ordinary step", _m3(slow_chunk=10**9), Work(M3_BYTES, cubic(3))),
        Row("nested-learning M3, slow step", _m3(slow_chunk=1), Work(M3_BYTES, lambda shape: 2 * cubic(3)(shape))),
    ]


def second_order_rows() -> list[Row]:
    every = {"preconditioning_compute_steps": 10}
    return [
        Row(ADAMW, functools.partial(torch.optim.AdamW, lr=LR, fused=True), elementwise(2)),
        Row(SHAMPOO, _pytorch_optimizer("Shampoo"), shampoo()),
        Row(SHAMPOO_EVERY_10, _pytorch_optimizer("Shampoo", **every), shampoo(), steps=10),
    ]


def _module(name: str, distribution: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise Missing(f"not installed: {distribution} (no module {error.name})") from None


def _pytorch_optimizer(name: str, **options: Any) -> Build:
    def build(params: list[nn.Parameter]) -> Stepper:
        return getattr(_module("pytorch_optimizer", "pytorch-optimizer"), name)(params, lr=LR, **options)

    return build


def _pytorch_optimizer_muon(params: list[nn.Parameter]) -> Stepper:
    # a plain list of parameters raises in 4.1.0
    groups = [{"params": params, "use_muon": True}]
    return _module("pytorch_optimizer", "pytorch-optimizer").Muon(groups, lr=LR)


def _keller_jordan(params: list[nn.Parameter]) -> Stepper:
    return _module("muon", "muon-optimizer").SingleDeviceMuon(params, lr=LR)


def _m3(slow_chunk: int) -> Build:
    def build(params: list[nn.Parameter]) -> Stepper:
        return _module("nested_learning.optim.m3", "nested-learning").M3(params, lr=LR, slow_chunk=slow_chunk)

    return build


class _DeepMomentum:
    """nested-learning's module, driven as its own manager does: one call a tensor."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        self.params = params
        self.module = _module("nested_learning.optim.deep", "nested-learning").DeepMomentum(variant="preconditioned")

    @torch.no_grad()
    def step(self) -> None:
        for i, param in enumerate(self.params):
            param.add_(self.module(param.grad, param_key=str(i)), alpha=-LR)


class WideMuon:
    """`torch.optim.Muon` with its Newton-Schulz iteration wider than in bfloat16, which some machines emulate."""

    def __init__(self, params: list[nn.Parameter], dtype: torch.dtype = torch.float32, **options: Any) -> None:
        self.optimizer, self.dtype = torch.optim.Muon(params, **{"lr": LR, **options}), dtype

    def step(self) -> None:
        with mock.patch.object(torch.optim._muon, "_zeropower_via_newtonschulz", wide_newton_schulz(self.dtype)):
            self.optimizer.step()


@functools.cache
def wide_newton_schulz(dtype: torch.dtype = torch.float32) -> Callable[..., Tensor]:
    """torch's own function with its one cast to bfloat16 made a copy in `dtype`: everything else is the same code."""
    module = torch.optim._muon
    source = inspect.getsource(module._zeropower_via_newtonschulz)
    cast = "grad.bfloat16()"
    if source.count(cast) != 1:
        raise Missing(f"torch {torch.__version__} orthogonalises in another way than by {cast}")
    # a copy, as the cast is: the function goes on in place
    source = source.replace(cast, f"grad.to({dtype}, copy=True)")
    namespace = dict(vars(module))
    exec(compile(source, f"<torch Muon in {dtype}>", "exec"), namespace)
    return namespace["_zeropower_via_newtonschulz"]
