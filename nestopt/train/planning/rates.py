"""How fast a GPU is: launches, bytes, and matrix products by dtype; stated, read from a file, or measured."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nestopt.config import ConfigError
from nestopt.models.cost import Cost

PEAK_TFLOPS = {"float32": 67.0, "tf32": 494.7, "bfloat16": 989.4}
"""Of an H100 SXM: NVIDIA's data sheet, whose numbers for tensor cores are with sparsity, halved."""

PEAK_BANDWIDTH = 3350.0
"""10⁹ bytes a second, of the same data sheet."""

SHARE = 0.75
"""Of these peaks, what large matrix products and streams are taken to reach: an assumption."""

LAUNCH = 5.0
"""10⁻⁶ seconds from one of PyTorch's eager operations to the next: an assumption."""

_AS = {"float16": "bfloat16"}
"""Dtypes that tensor cores multiply as fast as another."""


@dataclasses.dataclass(frozen=True)
class Rates:
    """What a device reaches.

    Args:
        per_launch_s: seconds from one small operation to the next.
        bytes_per_s: read and written.
        flops_per_s: of large matrix products, by dtype: `float32`, `tf32` and `bfloat16`.
        source: where the numbers are from, in words.

    Raises:
        ConfigError: a number that is not above 0, or a dtype too many or too few; names the key.
    """

    per_launch_s: float
    bytes_per_s: float
    flops_per_s: Mapping[str, float]
    source: str = "given"

    def __post_init__(self) -> None:
        if not isinstance(self.flops_per_s, Mapping):
            raise ConfigError.refuse("rates.flops_per_s", self.flops_per_s, f"give {_named(PEAK_TFLOPS)} numbers")
        for dtype in self.flops_per_s:
            if dtype not in PEAK_TFLOPS:
                raise ConfigError.unknown_key(
                    "rates.flops_per_s", dtype, self.flops_per_s[dtype], "flops_per_s", PEAK_TFLOPS
                )
        for dtype in PEAK_TFLOPS:
            _check(f"rates.flops_per_s.{dtype}", self.flops_per_s.get(dtype))
        for name in ("per_launch_s", "bytes_per_s"):
            _check(f"rates.{name}", getattr(self, name))

    @classmethod
    def stated(
        cls,
        tflops: Mapping[str, float] | None = None,
        bandwidth: float = PEAK_BANDWIDTH,
        launch: float = LAUNCH,
        share: float = SHARE,
    ) -> Rates:
        """Return a share of what a data sheet says, by default an H100 SXM's.

        Args:
            tflops: peaks in 10¹² operations a second by dtype; dtypes left out are an H100's.
            bandwidth: peak in 10⁹ bytes a second.
            launch: 10⁻⁶ seconds.
            share: of both peaks.
        """
        peaks = {**PEAK_TFLOPS, **(tflops or {})}
        for dtype, peak in peaks.items():
            if dtype not in PEAK_TFLOPS:
                raise ConfigError.unknown_key("--tflops", dtype, peak, "it", PEAK_TFLOPS)
            _check(f"--tflops {dtype}", peak)
        _check("--bandwidth", bandwidth)
        _check("--launch", launch)
        if not 0 < share <= 1:
            raise ConfigError.refuse("--share", share, "give a number above 0, 1 at the most")
        own = (peaks, bandwidth) != (PEAK_TFLOPS, PEAK_BANDWIDTH)
        whose = "the peaks that were given" if own else "the peaks of an H100 SXM's data sheet"
        return cls(
            launch * 1e-6,
            share * bandwidth * 1e9,
            {dtype: share * peak * 1e12 for dtype, peak in peaks.items()},
            f"stated, not measured: {share:.0%} of {whose}, and {launch:g} µs a launch",
        )

    @classmethod
    def read(cls, path: str | Path) -> Rates:
        """Return what is under `"rates"` in a JSON file, such as `benchmarks/gpu.py` writes.

        Raises:
            ConfigError: a file that cannot be read, or a key missing in it; names both.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError.refuse("--rates", str(path), f"give a JSON file that can be read ({error})") from None
        found = content.get("rates") if isinstance(content, dict) else None
        if not isinstance(found, dict):
            raise ConfigError.refuse("--rates", str(path), 'it must be a JSON object with the key "rates"')
        for key in (wanted := ("per_launch_s", "bytes_per_s", "flops_per_s")):
            if key not in found:
                raise ConfigError.refuse(
                    "--rates", str(path), f'"rates" in it has no {key!r}; it must have {_named(wanted)}'
                )
        return cls(found["per_launch_s"], found["bytes_per_s"], found["flops_per_s"], f"from {path}")

    def seconds(self, cost: Cost) -> dict[str, float]:
        """Return what its launches, its bytes and its products take, each as if the others took no time.

        Raises:
            ConfigError: products in a dtype that has no rate.
        """
        products = sum(flops / self.flops_per_s[self.dtype(name)] for name, flops in cost.products.items())
        return {"launches": cost.ops * self.per_launch_s, "bytes": cost.bytes / self.bytes_per_s, "products": products}

    def dtype(self, name: str) -> str:
        """Return the dtype whose rate products of the dtype `name` have."""
        found = _AS.get(name, name)
        if found not in self.flops_per_s:
            allowed = f"rates are known for products in {_named([*self.flops_per_s, *_AS])}"
            raise ConfigError.refuse("train.dtype", name, allowed)
        return found


def _named(names: Any) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}"


def _check(key: str, value: Any) -> None:
    real = isinstance(value, int | float) and not isinstance(value, bool)
    if not real or not 0 < value < math.inf:
        raise ConfigError.refuse(key, value, "give a number above 0")


# -- measured ----------------------------------------------------------------------------------------------------------


def measure(device: str | torch.device = "cuda") -> Rates:
    """Return the best of what this device reaches, in about two seconds.

    On a CPU all sizes are small: that it runs is what this is for.
    """
    device = torch.device(device)
    streams = streamed(device)
    flops = {dtype: multiplied(dtype, device) for dtype in PEAK_TFLOPS}
    name = "this CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
    return Rates(launched(device), max(streams.values()), flops, f"measured on {name}")


def launched(device: torch.device) -> float:
    """Return seconds from one small eager operation to the next; on a GPU it takes less than it takes to ask for it."""
    number = torch.zeros(1, device=device)
    return _fastest(lambda: number.add_(1.0), device, 100 if device.type == "cpu" else 5000)


def streamed(device: torch.device) -> dict[str, float]:
    """Return bytes a second, read and written, of operations on large float32 tensors, by name."""
    entries = 2**20 if device.type == "cpu" else 2**28
    x, y = (torch.ones(entries, device=device) for _ in range(2))
    runs: dict[str, tuple[int, Callable[[], object]]] = {
        "copy": (2, lambda: y.copy_(x)),
        "add": (3, lambda: y.add_(x, alpha=1e-3)),
        "scale": (2, lambda: y.mul_(1)),
    }
    return {name: 4 * passes * entries / _fastest(run, device, 3) for name, (passes, run) in runs.items()}


def multiplied(dtype: str, device: torch.device) -> float:
    """Time a large square product of random numbers, in operations a second (on zeros a GPU is faster)."""
    side = side_of(device)
    a, b, out = factors(dtype, device, side, side)
    with float32_products(dtype):
        return 2 * side**3 / _fastest(lambda: torch.mm(a, b, out=out), device, 3)


def side_of(device: torch.device) -> int:
    """Return the side of the square matrices that are multiplied."""
    return 256 if device.type == "cpu" else 8192


def factors(dtype: str, device: torch.device, *shape: int) -> list[Tensor]:
    """Return two random factors and a result, for products in `dtype`."""
    kind: torch.dtype = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
    return [torch.randn(shape, device=device).to(kind) for _ in range(3)]


@contextmanager
def float32_products(dtype: str) -> Iterator[None]:
    """Have float32 products made in TF32 if that is the dtype, and else not."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _fastest(run: Callable[[], object], device: torch.device, times: int, budget_s: float = 0.2) -> float:
    """Return seconds of one call, from the fastest of as many rounds of `times` calls as the budget allows."""

    def wait() -> None:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)

    run()
    wait()
    until, best = time.perf_counter() + budget_s, math.inf
    while True:
        begun = time.perf_counter()
        for _ in range(times):
            run()
        wait()
        best = min(best, (time.perf_counter() - begun) / times)
        if time.perf_counter() > until:
            return best
