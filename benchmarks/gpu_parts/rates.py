"""What the card can do at best: the rates from which a plan tells times (`nestopt plan`)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.gpu_parts.clock import best, wall_seconds
from benchmarks.gpu_parts.setting import Row, Setting, attempts

RATES = "rates"
"""The row with all that a plan takes: `per_launch_s`, `bytes_per_s`, `flops_per_s` by dtype."""

DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16}


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
        if row.name == f"products, {list(DTYPES)[-1]}":
            yield _for_the_plan(found)


def _for_the_plan(found: dict[str, float]) -> Row:
    """The keys that a plan takes, each in its unit; those that could not be measured are not there."""
    values: dict[str, Any] = {name: found[name] for name in ("per_launch_s", "bytes_per_s") if name in found}
    values["flops_per_s"] = {name: found[name] for name in DTYPES if name in found}
    return Row(RATES, "measured", values=values)


def _launch(setting: Setting, found: dict[str, float]) -> Row:
    """An operation on one number: on the device it takes less than it takes to ask for it."""
    x = torch.zeros(1, device=setting.device)
    count = 200 if setting.tiny else 5000

    def many() -> None:
        for _ in range(count):
            x.add_(1.0)

    wall_seconds(setting, many)
    found["per_launch_s"] = min(wall_seconds(setting, many) for _ in range(5)) / count
    weight = torch.ones(1, device=setting.device, requires_grad=True)

    def with_gradients() -> None:
        y = weight
        for _ in range(count // 10):
            y = y * weight
        y.backward()

    wall_seconds(setting, with_gradients)
    # forward one product; backward two products and, but for the first, a sum
    trained = min(wall_seconds(setting, with_gradients) for _ in range(5)) / (count // 10 * 4)
    return Row("launch", "measured", values={"µs": 1e6 * found["per_launch_s"], "µs, with autograd": 1e6 * trained})


def _bandwidth(setting: Setting, found: dict[str, float]) -> Row:
    entries = 2**16 if setting.tiny else 2**28
    x, y = (torch.ones(entries, device=setting.device) for _ in range(2))
    ways = {"copy": (2, lambda: y.copy_(x)), "add": (3, lambda: y.add_(x, alpha=1e-3)), "scale": (2, lambda: y.mul_(1))}
    moved = {
        f"{name}, GB/s": 4e-9 * passes * entries / best(setting, run, 0.01 if setting.tiny else 0.3)
        for name, (passes, run) in ways.items()
    }
    found["bytes_per_s"] = 1e9 * max(moved.values())
    return Row("bandwidth", "measured", values=moved)


def _products(setting: Setting, name: str, found: dict[str, float]) -> Row:
    """A large square product of random numbers: on zeros a card runs faster than it ever does in earnest."""
    side = 128 if setting.tiny else 8192
    a, b = (torch.randn(side, side, device=setting.device).to(DTYPES[name]) for _ in range(2))
    out = torch.empty_like(a)
    rate = 2 * side**3 / _timed(setting, name, lambda: torch.mm(a, b, out=out))
    found[name] = rate
    return Row(f"products, {name}", "measured", values={"TFLOP/s": rate / 1e12, "side": side})


def _small(setting: Setting, name: str) -> Row:
    """As memories multiply: many matrices of 64 × 64 at once. For the record: a plan takes the large ones' rate."""
    count = 64 if setting.tiny else 8192
    a, b = (torch.randn(count, 64, 64, device=setting.device).to(DTYPES[name]) for _ in range(2))
    out = torch.empty_like(a)
    rate = 2 * count * 64**3 / _timed(setting, name, lambda: torch.bmm(a, b, out=out))
    return Row(f"small products, {name}", "measured", values={"TFLOP/s": rate / 1e12, "side": 64})


def _timed(setting: Setting, name: str, product: Callable[[], object]) -> float:
    """Seconds of a product, with TF32 on for that name alone."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if name == "tf32" else "ieee"
    try:
        return best(setting, product, 0.01 if setting.tiny else 0.6, repeat=2)
    finally:
        matmul.fp32_precision = before
