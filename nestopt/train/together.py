"""What processes do alike: they stop together, and what goes wrong in one is an error in all."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from nestopt.config import ConfigError
from nestopt.train.engines import Engine
from nestopt.train.errors import CheckpointError, CorpusError

T = TypeVar("T")


def agreed(engine: Engine, do: Callable[[], T]) -> T:
    """Return what a function gives in this process; what it raises in one is raised in all."""
    problem: Exception | None = None
    try:
        found = do()
    except (CheckpointError, ConfigError, CorpusError, OSError) as error:
        problem = error
    for other in engine.gathered(problem):
        if other is not None:
            raise other
    return found


class Stop(threading.Event):
    """Whether to stop, and the name of the signal that asked for it."""

    name = "a signal to another process"


@contextmanager
def stop_signal() -> Iterator[Stop]:
    """Set by the first Ctrl-C or SIGTERM, so that a step is never cut in two; the second acts at once."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, frame: Any) -> None:
        stop.name = signal.Signals(number).name
        stop.set()
        for n, before in old.items():
            signal.signal(n, before)

    old = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, before in old.items():
            signal.signal(number, before)
