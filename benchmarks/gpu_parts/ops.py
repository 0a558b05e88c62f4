"""Every operation with its gradients, in float32 and in bfloat16, against values made on the CPU in float64."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator

import torch

from benchmarks.gpu_parts import values
from benchmarks.gpu_parts.setting import Row, Setting, attempts, error_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def run(setting: Setting) -> Iterator[Row]:
    if setting.values.exists():
        true = values.read(setting.values)
    else:
        begun = time.monotonic()
        true = values.make()
        yield Row("values", "measured", f"no {setting.values}: made here", {"s": time.monotonic() - begun})
    rows: list[tuple[str, Callable[[], Row]]] = []
    for dtype in DTYPES:  # all in float32 first
        for name in values.CASES:
            rows.append((f"{name}, {dtype}", functools.partial(_compared, setting, name, dtype, true)))
    yield from attempts(setting, rows)


def _compared(setting: Setting, name: str, dtype: str, true: values.Values) -> Row:
    found = values.evaluate(name, setting.device, DTYPES[dtype])
    wanted = {key.removeprefix(f"{name}/") for key in true if key.startswith(f"{name}/") and "/in." not in key}
    if wanted != set(found):
        raise ValueError(f"{name} gives {sorted(set(found) ^ wanted)} here or in the file alone")
    errors = {key: error_of(value, true[f"{name}/{key}"]) for key, value in found.items()}
    worst = max(errors, key=lambda key: (errors[key] != errors[key], errors[key]))
    return Row.of(f"{name}, {dtype}", errors[worst], values.CASES[name].bounds[dtype], worst=worst)
