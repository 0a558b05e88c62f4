"""Parts of a GPU run that do not end as they should; each has its name from the setting."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator

from benchmarks.gpu_parts.setting import Row, Setting, attempts


def run(setting: Setting) -> Iterator[Row]:
    yield Row("first", "measured", values={"ms": 1.0, "nan": float("nan")})
    if setting.part == "hangs":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        yield Row("child", "measured", values={"pid": child.pid})
        wait_for_ever()
    if setting.part == "dies":
        print("its last words", flush=True)
        os.abort()
    if setting.part == "raises":
        raise RuntimeError("not one of its rows")
    if setting.part == "rates":
        yield Row("rates", "measured", values={"per_launch_s": 1e-6, "flops_per_s": {"float32": 1.0}})
    if setting.part == "after":
        yield Row("told", "measured", values={"rates": str(setting.rates)})
        yield from attempts(setting, [("bad", _bad), ("good", lambda: Row.of("good", 1e-7, 1e-6))])


def _bad() -> Row:
    raise ValueError("a row that fails")


def wait_for_ever() -> None:
    while True:
        time.sleep(1)
