"""What the machine can do at best: the rates that floors are computed from."""

from __future__ import annotations

import dataclasses
import os
import platform
import time
from collections.abc import Callable

import torch

from benchmarks.timing import clock

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class Rates:
    """Attributes:
    bytes_per_s: moved by the best of three streaming operations, reads and writes together.
    flops_per_s: of a square matrix product, by the name of its dtype.
    """

    bytes_per_s: float
    flops_per_s: dict[str, float]

    def best(self, other: Rates) -> Rates:
        """The higher of each: other work on the machine lowers a probe and never raises it."""
        flops = {name: max(rate, other.flops_per_s[name]) for name, rate in self.flops_per_s.items()}
        return Rates(max(self.bytes_per_s, other.bytes_per_s), flops)

    @property
    def native_bfloat16(self) -> bool:
        """Whether bfloat16 products are at least as fast as float32 ones; where they are emulated they are not."""
        return self.flops_per_s["bfloat16"] >= self.flops_per_s["float32"]


def probe(side: int = 1024, entries: int = 24 * 2**20, budget_s: float = 1.5) -> Rates:
    """Measure at the current number of threads.

    Args:
        side: of the matrices multiplied.
        entries: of each streamed float32 tensor; three together should be far larger than the caches.
        budget_s: wall time for each operation, which is repeated within it and whose fastest run counts.
    """
    flops = {}
    for name, dtype in DTYPES.items():
        a, b = (torch.randn(side, side).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        flops[name] = 2 * side**3 / _fastest(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), budget_s)
    x, y, z = torch.randn(entries), torch.randn(entries), torch.zeros(entries)
    streams = (  # with the float32 tensors each reads and writes
        (2, lambda: z.mul_(1.0)),
        (3, lambda: z.add_(x, alpha=1e-3)),
        (4, lambda: z.addcmul_(x, y, value=1e-3)),
    )
    return Rates(max(4 * passes * entries / _fastest(run, budget_s) for passes, run in streams), flops)


def _fastest(run: Callable[[], object], budget_s: float) -> float:
    now, until, best = clock(), time.perf_counter() + budget_s, float("inf")
    run()
    while True:
        start, runs, took = now(), 0, 0.0
        while took < 1e-3:  # a clock of CPU time may stand still for longer than a short run
            run()
            runs, took = runs + 1, now() - start
        best = min(best, took / runs)
        if time.perf_counter() > until:
            return best


def describe() -> dict[str, object]:
    """The machine and the software, for the record beside every table."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load at the start": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
