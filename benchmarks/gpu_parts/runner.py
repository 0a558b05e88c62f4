"""A part in a process of its own, which is ended with all that it has started when its time is up."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu_parts import MARGIN_S, Part

ROOT = Path(__file__).resolve().parents[2]
WORKER = "benchmarks.gpu_parts.worker"

Told = dict[str, Any]
"""What a worker has sent: `{"row": …}`, `{"machine": …}`, `{"lost": …}`, or at the end `{"end": true}`."""

LEAVE_S = 5.0
"""What a process may take to leave once all its results are there."""


@dataclasses.dataclass
class Ended:
    """What became of a part.

    Attributes:
        part: which.
        rows: as `benchmarks.gpu_parts.setting.Row` has them, as plain data.
        seconds: it took, its start included.
        limit_s: it had.
        how: `"done"`, `"killed"` at its limit, `"died"`, or `"not run"`.
        words: why, where it is not done.
    """

    part: str
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    limit_s: float = 0.0
    how: str = "not run"
    words: str = ""


def run(
    part: Part, setting: dict[str, Any], limit_s: float, log: Path, ended: Ended, tell: Callable[[Told], None]
) -> None:
    """Run a part to its end, or to its limit.

    Args:
        part: which.
        setting: for `Setting.from_data`, but for `part` and `until`.
        limit_s: seconds, the start of the process included.
        log: a file to which all is appended that the process prints.
        ended: filled in as results come, so that they are there whatever happens.
        tell: called with what the worker sends, as it comes.
    """
    begun = time.monotonic()
    ended.limit_s, ended.how = limit_s, "killed"
    given = {**setting, "part": part.name, "until": begun + limit_s - MARGIN_S}

    def take(told: Told) -> None:
        if "row" in told:
            ended.rows.append(told["row"])
        if "end" in told:
            ended.how = "done"
        tell(told)

    with log.open("ab") as out:
        out.write(f"\n=== {part.name} ===\n".encode())
        out.flush()
        start = out.tell()
        process, receiver = _start(part.where, given, out)
        try:
            over = _follow(process, receiver, begun + limit_s, take)
        finally:
            _end(process)
            receiver.close()
            ended.seconds = time.monotonic() - begun
    if ended.how == "done":  # how it left is no result, but is said
        ended.words = f"then {_status(process.returncode)}" if process.returncode and not over else ""
    elif over:
        ended.words = f"its {limit_s:.0f} s were up; it was {_last_place(log, start)}"
    else:
        ended.how, ended.words = "died", f"{_status(process.returncode)}: {_last_line(log, start)}"


def _start(where: str, given: dict[str, Any], out: Any) -> tuple[subprocess.Popen[bytes], Any]:
    receiver, sender = os.pipe()
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    threads = {"OMP_WAIT_POLICY": "PASSIVE"}  # as `nestopt train` has it
    if given.get("tiny") and given.get("device") == "cpu":
        threads["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, "-m", WORKER, where, json.dumps(given), str(sender)]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**threads, **os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=subprocess.STDOUT,
        pass_fds=(sender,),
        start_new_session=True,  # so that its children can be ended with it
    )
    os.close(sender)
    return process, os.fdopen(receiver, "rb", buffering=0)


def _follow(process: subprocess.Popen[bytes], receiver: Any, until: float, take: Callable[[Told], None]) -> bool:
    """Take what comes until the process has left, with all results or without; whether its time was up before that."""
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(receiver, selectors.EVENT_READ)
        while (left := until - time.monotonic()) > 0:
            if not selector.select(min(left, 0.5)):
                if process.poll() is not None:  # a child of its own may have kept the other end open
                    return False
                continue
            piece = receiver.read(1 << 16)
            if not piece:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(min(left, LEAVE_S))
                return False
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                take(json.loads(line))
    return True


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process and whatever is left of its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    # one that waits for a driver may not go at once
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(5.0)


def _status(code: int) -> str:
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"


def _tail(log: Path, start: int) -> list[str]:
    with log.open("rb") as file:
        file.seek(start)
        return file.read().decode(errors="replace").splitlines()


def _last_line(log: Path, start: int) -> str:
    lines = [line.strip() for line in _tail(log, start) if line.strip()]
    return lines[-1][:200] if lines else "it said nothing"


def _last_place(log: Path, start: int) -> str:
    """Where it stood, of what its fault handler has written: the innermost place of ours, or the innermost at all."""
    lines = list(_places(_tail(log, start)))
    own = [line for line in lines if "/nestopt/" in line or "/benchmarks/" in line]
    return f"at {(own or lines)[0]}" if lines else "nowhere that it said"


def _places(lines: list[str]) -> Iterator[str]:
    """`File "…", line N in …` of the last dump, innermost first."""
    dumps = [i for i, line in enumerate(lines) if line.startswith("Timeout (")]
    for line in lines[dumps[-1] :] if dumps else []:
        if line.strip().startswith('File "'):
            yield line.strip().removeprefix("File ").replace('"', "")
