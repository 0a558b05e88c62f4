"""The process of one part: `python -m benchmarks.gpu_parts.worker MODULE SETTING FD`; rows go into FD as JSON lines."""

from __future__ import annotations

import dataclasses
import faulthandler
import importlib
import json
import math
import os
import sys
import time
import warnings
from typing import Any

from benchmarks.gpu_parts import MARGIN_S


def main(where: str, given: str, descriptor: int) -> None:
    faulthandler.enable()
    data = json.loads(given)
    # where it stood when its time was up goes into the log
    faulthandler.dump_traceback_later(max(0.1, data["until"] - time.monotonic() + MARGIN_S / 2))
    os.set_inheritable(descriptor, False)
    warnings.simplefilter("once")
    with os.fdopen(descriptor, "w") as out:

        def send(kind: str, data: Any) -> None:
            out.write(json.dumps({kind: plain(data)}, ensure_ascii=False) + "\n")
            out.flush()

        from benchmarks.gpu_parts.setting import Lost, Setting

        describes = data.pop("describe", False)
        setting = Setting.from_data(data)
        if describes:
            from benchmarks.gpu_parts.machine import describe

            send("machine", describe(setting))
        try:
            for row in importlib.import_module(where).run(setting):
                send("row", dataclasses.asdict(row))
        except Lost as lost:
            send("lost", str(lost))
        send("end", True)


def plain(data: Any) -> Any:
    """`data` with what JSON has no word for, such as NaN, as text."""
    if isinstance(data, dict):
        return {str(key): plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [plain(value) for value in data]
    if isinstance(data, float) and not math.isfinite(data):
        return str(data)
    return data


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
