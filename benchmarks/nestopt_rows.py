"""What nestopt has for each table. All is looked up when it is built: what is not there is reported as such."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import nestopt
from benchmarks.peer_rows import ADAMW, LION, LR, M3_BYTES, MUON, MUON_FLOAT32, SGD, SHAMPOO_EVERY_10, Build
from benchmarks.rows import Missing, Row, Stepper
from benchmarks.work import Work, elementwise, passes, quintic, shampoo
from nestopt.levels.gradient.newton_schulz import work_dtype

SLOW_PERIOD = 16  # of M3


def elementwise_rows() -> list[Row]:
    stacks: list[tuple[str, Callable[[], nestopt.Level], int, str]] = [
        ("momentum, adam, momentum", _mixed_stack, 4, ADAMW),
        ("three momenta", _momenta, 3, ADAMW),
        ("lion (a plugin's level)", level("lion"), 1, LION),
    ]
    eager = [Row(f"nestopt {name}", nested(stack), elementwise(n), peer) for name, stack, n, peer in stacks]
    compiled = [
        Row(f"nestopt {name}, compiled", nested(stack, compile=True), elementwise(n), peer, compiled=True)
        for name, stack, n, peer in stacks
    ]
    return [
        Row("nestopt SGD-momentum", named("SGD", momentum=0.9), elementwise(1), SGD),
        Row("nestopt AdamW", named("AdamW"), elementwise(2), ADAMW),
        *eager,
        *compiled,
    ]


def matrix_rows() -> list[Row]:
    own = str(work_dtype(torch.empty(0))).removeprefix("torch.")
    peer = MUON if own == "bfloat16" else MUON_FLOAT32

    def m3_flops(shape: tuple[int, ...]) -> float:
        return quintic(5)(shape) * (1 + 1 / SLOW_PERIOD)

    return [
        Row("nestopt Muon", named("Muon"), Work(passes(3, 2), quintic(5), _muon_dtype(own)), peer),
        Row(
            "nestopt muon (the level)",
            nested(level("muon")),
            Work(passes(3, 2), quintic(5), own),
            peer,
        ),
        Row(
            f"nestopt M3, mean of {SLOW_PERIOD}",
            nested(level("m3", slow_period=SLOW_PERIOD)),
            Work(M3_BYTES, m3_flops, own),
            peer,
            steps=SLOW_PERIOD,
        ),
    ]


def second_order_rows() -> list[Row]:
    return [Row("nestopt shampoo, roots every 10", nested(level("shampoo")), shampoo(), SHAMPOO_EVERY_10, steps=10)]


def _mixed_stack() -> nestopt.Level:
    levels = nestopt.levels
    return nestopt.chain(levels.momentum(0.9), levels.adam(), levels.momentum(0.5, dampening=0.5))


def _momenta() -> nestopt.Level:
    momentum = nestopt.levels.momentum
    return nestopt.chain(momentum(0.9), momentum(0.5, dampening=0.5), momentum(0.9, dampening=0.9))


def level(name: str, **fields: Any) -> Callable[[], nestopt.Level]:
    def make() -> nestopt.Level:
        try:
            kind = getattr(nestopt.levels, name)
        except AttributeError as error:
            raise Missing(f"not there: {error}") from None
        return kind(**fields)

    return make


def nested(stack: Callable[[], nestopt.Level], **options: Any) -> Build:
    def build(params: list[nn.Parameter]) -> Stepper:
        _require(nestopt.optim.Nested, options)
        return nestopt.optim.Nested(params, stack(), lr=LR, **options)

    return build


def named(name: str, **options: Any) -> Build:
    def build(params: list[nn.Parameter]) -> Stepper:
        optimizer = getattr(nestopt.optim, name, None)
        if optimizer is None:
            raise Missing(f"not there: nestopt.optim.{name}")
        return optimizer(params, lr=LR, **options)

    return build


def _require(optimizer: type, options: dict[str, Any]) -> None:
    known = inspect.signature(optimizer).parameters
    for option in options:
        if option not in known:
            raise Missing(f"not there: {optimizer.__name__}({option}=…)")


def _muon_dtype(own: str) -> str:
    """The dtype in which `nestopt.optim.Muon` iterates; `own` is the library's choice for this machine."""
    optimizer = nestopt.optim.Muon([nn.Parameter(torch.zeros(2, 2))])
    return getattr(optimizer.level(optimizer.param_groups[0]), "dtype", None) or own
