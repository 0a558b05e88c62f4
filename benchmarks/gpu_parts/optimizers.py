"""Steps of optimizers on the device against torch's own on the CPU in float64, on the same gradients.

Each is stepped plainly, as `capturable=True`, and on bfloat16 parameters. After its first step no step may wait for the
device (`torch.cuda.set_sync_debug_mode`), but for those that say so.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

import nestopt
from benchmarks.gpu_parts.setting import NO_CUDA, Row, Setting, attempts, error_of, generator, no_waits
from benchmarks.peer_rows import WideMuon

STEPS = 12
LR = 0.02
REST = {"stack": "adamw", "lr": LR}
ROOT_EVERY = 4
HIDDEN = ("up.weight", "down.weight")
"""What Muon takes of `Small`."""


class Stepper(Protocol):
    def step(self) -> object: ...


class Small(nn.Module):
    """Every kind of tensor that a language model has: an embedding, matrices of both shapes, a norm, biases, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(61, 48)
        self.up, self.norm, self.down = nn.Linear(48, 80), nn.LayerNorm(80), nn.Linear(80, 48)
        self.head = nn.Linear(48, 61, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.down(self.norm(self.up(self.embedding(tokens)))))


@dataclasses.dataclass(frozen=True)
class Case:
    """An optimizer of ours, and what it is to do.

    Attributes:
        ours: from a model, and whether its steps are to be capturable.
        true: from the same model on the CPU in float64: torch's optimizers, or where torch has none our own there,
            which the tests hold against loops.
        bound: of the error of all that the steps have changed, by its root mean square, in float32.
        waits: whether a step, counted from 1, waits by contract; a capturable one then waits always, or is refused.
    """

    ours: Callable[[nn.Module, bool], Stepper]
    true: Callable[[nn.Module], Stepper]
    bound: float = 5e-5
    waits: Callable[[int], bool] | None = None


def _named(name: str, **options: Any) -> Callable[[nn.Module, bool], Stepper]:
    def make(model: nn.Module, capturable: bool) -> Stepper:
        return getattr(nestopt.optim, name)(model.parameters(), lr=LR, capturable=capturable, **options)

    return make


def _torch(name: str, **options: Any) -> Callable[[nn.Module], Stepper]:
    return lambda model: getattr(torch.optim, name)(model.parameters(), lr=LR, **options)


def _stack(spec: Any) -> Callable[[nn.Module, bool], Stepper]:
    return lambda model, capturable: nestopt.optimizer(model, spec, lr=LR, rest=REST, capturable=capturable)


def _own(spec: Any) -> Callable[[nn.Module], Stepper]:
    return lambda model: nestopt.optimizer(model, spec, lr=LR, rest=REST)


class _MuonAndAdamW:
    """torch's Muon, in the dtype of the parameters, for the hidden matrices, and its AdamW for all else."""

    def __init__(self, model: nn.Module) -> None:
        hidden = [param for name, param in model.named_parameters() if name in HIDDEN]
        others = [param for name, param in model.named_parameters() if name not in HIDDEN]
        self.parts = WideMuon(hidden, torch.float64, lr=LR, weight_decay=0.0), torch.optim.AdamW(others, lr=LR)

    def step(self) -> None:
        for part in self.parts:
            part.step()


def _roots(step: int) -> bool:
    return step <= ROOT_EVERY or (step - 1) % ROOT_EVERY == 0


_MUON = {"level": "muon", "dtype": "float32"}
_M3 = {"level": "m3", "slow_period": 4}
_SHAMPOO = {"level": "shampoo", "root_every": ROOT_EVERY}

CASES: dict[str, Case] = {
    "AdamW": Case(_named("AdamW", weight_decay=0.1), _torch("AdamW", weight_decay=0.1)),
    "Adam": Case(_named("Adam", weight_decay=0.1), _torch("Adam", weight_decay=0.1)),
    "Adam, amsgrad": Case(_named("Adam", amsgrad=True), _torch("Adam", amsgrad=True)),
    "adamw, the level": Case(_stack("adamw"), _torch("AdamW")),
    "muon in float32, rest adamw": Case(_stack(_MUON), _MuonAndAdamW, 1e-4),
    # in bfloat16 where the hardware multiplies in it: a percent of the direction
    "muon, rest adamw": Case(_stack("muon"), _MuonAndAdamW, 6e-2),
    "m3 in float32, rest adamw": Case(_stack({**_M3, "dtype": "float32"}), _own({**_M3, "dtype": "float64"}), 1e-4),
    "shampoo, rest adamw": Case(_stack(_SHAMPOO), _own(_SHAMPOO), 1e-3, _roots),
}

NARROW = 2e-2
"""The bound for bfloat16 parameters, of their own size: each step rounds them to 8 bits."""


def run(setting: Setting) -> Iterator[Row]:
    rows: list[tuple[str, Callable[[], Row]]] = [("the check for waits itself", lambda: _raises(setting))]
    for name, case in CASES.items():
        ways = {name: (False, torch.float32), f"{name}, capturable": (True, torch.float32)}
        ways[f"{name}, bfloat16 parameters"] = (False, torch.bfloat16)
        for label, (capturable, dtype) in ways.items():
            rows.append((label, functools.partial(_compared, setting, label, case, capturable, dtype)))
    yield from attempts(setting, rows)


def _raises(setting: Setting) -> Row:
    """What is meant to be seen is seen: a number that is read, and one that is copied, each raise."""
    name = "the check for waits itself"
    if not setting.cuda:
        return Row(name, "skipped", NO_CUDA)
    one, seen = torch.ones((), device=setting.device), 0
    for wait in (lambda: float(one), lambda: torch.tensor(1.0, device=setting.device)):
        try:
            with no_waits(setting):
                wait()
        except RuntimeError:
            seen += 1
    return Row(name, "passed" if seen == 2 else "failed", f"{seen} of 2 waits were seen")


def _compared(setting: Setting, name: str, case: Case, capturable: bool, dtype: torch.dtype) -> Row:
    start, gradients = _start(dtype), _gradients(dtype)
    ours, true = copy.deepcopy(start).to(setting.device), copy.deepcopy(start).double()
    reference = case.true(true)
    try:
        optimizer = case.ours(ours, capturable)
    except ValueError as refused:
        if not (capturable and case.waits):
            raise
        return Row(name, "skipped", f"refused: {refused}")
    for step, grads in enumerate(gradients, start=1):
        for own, other, grad in zip(ours.parameters(), true.parameters(), grads, strict=True):
            own.grad, other.grad = grad.to(setting.device), grad.double()
        reference.step()
        waits = case.waits is not None and (capturable or case.waits(step))
        with contextlib.nullcontext() if step == 1 or waits else no_waits(setting):  # the first makes the states
            optimizer.step()
    narrow = dtype != torch.float32
    errors = {}
    for (key, own), other, begun in zip(ours.named_parameters(), true.parameters(), start.parameters(), strict=True):
        # of what has changed; but narrow parameters can't follow small changes
        base = torch.zeros_like(other) if narrow else begun.detach().double()
        errors[key] = error_of(own.detach().cpu().double() - base, other.detach() - base)
    worst = max(errors, key=lambda key: (errors[key] != errors[key], errors[key]))
    return Row.of(name, errors[worst], NARROW if narrow else case.bound, worst=worst)


def _start(dtype: torch.dtype) -> Small:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Small().to(dtype)


def _gradients(dtype: torch.dtype) -> list[list[Tensor]]:
    """For every step; their sizes differ by tensor and step, so that nothing that forgets scale goes unnoticed."""
    made, random = [], generator(1)
    for step in range(STEPS):
        sizes = [0.1 * (1 + step % 3) * (1 + i) for i, _ in enumerate(Small().parameters())]
        params = list(_start(dtype).parameters())
        pairs = zip(params, sizes, strict=True)
        made.append([(size * torch.randn(param.shape, generator=random)).to(dtype) for param, size in pairs])
    return made
