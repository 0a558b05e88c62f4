"""What the card can do at best: the rates from which a plan tells times (`nestopt plan`)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.gpu_parts.clock import best, wall_seconds
from benchmarks.gpu_parts.setting import Row, Setting, attempts
from nestopt.train.planning import rates

RATES = "rates"
"""The row with all that a plan takes: `per_launch_s`, `bytes_per_s`, `flops_per_s` by dtype."""

DTYPES = tuple(rates.PEAK_TFLOPS)


def run(setting: Setting) -> Iterator[Row]:
    found: dict[str, float] = {}
    rows: list[tuple[str, Callable[[], Row]]] = [
        ("launch", functools.partial(_launch, setting, found)),
        ("bandwidth", functools.partial(_bandwidth, setting, found)),
    ]
    rows += [(f"products, {name}", functools.partial(_products, setting, name, found)) for name in DTYPES]
    rows += [(f"small products, {name}", functools.partial(_small, setting, name)) for name in DTYPES]
    for row in attempts(setting, rows):
        yield row
        if row.name == f"products, {DTYPES[-1]}":
            yield _for_the_plan(found)


def _for_the_plan(found: dict[str, float]) -> Row:
    """The keys that a plan takes, each in its unit; those that could not be measured are not there."""
    values: dict[str, Any] = {name: found[name] for name in ("per_launch_s", "bytes_per_s") if name in found}
    values["flops_per_s"] = {name: found[name] for name in DTYPES if name in found}
    return Row(RATES, "measured", values=values)


def _launch(setting: Setting, found: dict[str, float]) -> Row:
    """An operation on one number, and one with its gradients."""
    found["per_launch_s"] = rates.launched(torch.device(setting.device))
    count = 20 if setting.tiny else 500
    weight = torch.ones(1, device=setting.device, requires_grad=True)

    def with_gradients() -> None:
        y = weight
        for _ in range(count):
            y = y * weight
        y.backward()

    wall_seconds(setting, with_gradients)
    # forward one product; backward two products and, but for the first, a sum
    trained = min(wall_seconds(setting, with_gradients) for _ in range(5)) / (count * 4)
    return Row("launch", "measured", values={"µs": 1e6 * found["per_launch_s"], "µs, with autograd": 1e6 * trained})


def _bandwidth(setting: Setting, found: dict[str, float]) -> Row:
    moved = rates.streamed(torch.device(setting.device))
    found["bytes_per_s"] = max(moved.values())
    return Row("bandwidth", "measured", values={f"{name}, GB/s": rate / 1e9 for name, rate in moved.items()})


def _products(setting: Setting, name: str, found: dict[str, float]) -> Row:
    device = torch.device(setting.device)
    found[name] = rates.multiplied(name, device)
    return Row(f"products, {name}", "measured", values={"TFLOP/s": found[name] / 1e12, "side": rates.side_of(device)})


def _small(setting: Setting, name: str) -> Row:
    """As memories multiply: many matrices of 64 × 64 at once. For the record: a plan takes the large ones' rate."""
    count = 64 if setting.tiny else 8192
    a, b, out = rates.factors(name, torch.device(setting.device), count, 64, 64)
    with rates.float32_products(name):
        seconds = best(setting, lambda: torch.bmm(a, b, out=out), 0.01 if setting.tiny else 0.6, repeat=2)
    return Row(
        f"small products, {name}", "measured", values={"TFLOP/s": 2 * count * 64**3 / seconds / 1e12, "side": 64}
    )
