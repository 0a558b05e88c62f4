"""Several processes begin alike and end together: when one fails, all others are told what failed, and end."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import secrets
import selectors
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store
from torch.distributed.rendezvous import rendezvous

from nestopt.config import ConfigError
from nestopt.config.errors import show
from nestopt.train.engines import launch
from nestopt.train.errors import TrainingError

GRACE = 3.0
"""Seconds in which a process may end by itself once another has failed; then it is ended."""

LATE = 8.0
"""Seconds in which a process that fails before it has joined the others tries to reach them."""

EXIT_FAILED = 1


class Watch:
    """One process's line to the others: the first process holds a connection to each of them.

    A connection that breaks is noticed at once, whatever ended the process (kill -9 too), and needs no collective: a
    process that waits in one is ended from a thread of its own.
    """

    def __init__(self) -> None:
        self.rank, self.world, self.joined = 0, 1, False
        self.failure: str | None = None
        """What failed first."""
        self._store: Any = None
        self._comparisons = 0
        self._news, self._left = threading.Event(), threading.Event()
        self._lock = threading.Condition(threading.RLock())
        self._others: dict[int, socket.socket] = {}

    def join(self, timeout: float | None) -> None:
        """Meet the other processes that were started with this one, or with which it has a group; once.

        Args:
            timeout: seconds to wait for them; None is torch's 30 minutes.

        Raises:
            TrainingError: they did not all come.
        """
        if self.joined:
            return
        limit = default_pg_timeout if timeout is None else timedelta(seconds=timeout)
        if dist.is_initialized():
            store = _get_default_store()
            self.rank, self.world = dist.get_rank(), dist.get_world_size()
        else:
            launch.prepare()
            if launch.processes() == 1:
                return
            self.world = launch.processes()
            try:
                store, self.rank, self.world = next(rendezvous("env://", timeout=limit))
            except (dist.DistError, RuntimeError) as error:
                raise TrainingError(
                    f"{self.world} processes were started, and not all of them came within "
                    f"{limit.total_seconds():g} seconds (train.timeout): {_line(error)}"
                ) from error
        if self.world == 1:
            return
        self.joined = True
        store.set_timeout(limit)
        self._store = PrefixStore(f"nestopt/{next(_numbers)}", store)  # as often in every process
        if self.rank == 0:
            self._listen()
        else:
            self._connect(limit.total_seconds())

    def group_options(self) -> dict[str, Any]:
        """Return where `init_process_group` is to meet the others; nothing before `join` has met any."""
        return {"store": self._store, "rank": self.rank, "world_size": self.world} if self.joined else {}

    def compare(self, facts: Mapping[str, Any]) -> None:
        """Compare values that must be the same in all processes, by key; all must call it. They must suit JSON.

        Raises:
            ConfigError: they differ; the same in all processes.
        """
        if not self.joined:
            return
        self._comparisons += 1
        key = f"facts/{self._comparisons}"
        self._store.set(f"{key}/{self.rank}", json.dumps(facts))
        if self.rank == 0:
            found = [json.loads(self._store.get(f"{key}/{rank}")) for rank in range(self.world)]
            self._store.set(key, json.dumps(differences(found)))
        if found := json.loads(self._store.get(key)):
            heard = [f"{key}/{rank}/heard" for rank in range(1, self.world)]
            if self.rank:
                self._store.set(heard[self.rank - 1], "")
            else:  # the store ends with this process, and with it what the others read there
                with contextlib.suppress(dist.DistError, RuntimeError):
                    self._store.wait(heard, timedelta(seconds=GRACE))
            raise ConfigError.of([ConfigError(problem, path) for path, problem in found])

    def fail(self, error: BaseException) -> None:
        """Tell the others that this process has failed, also before it has joined them."""
        if not self.joined:
            try:
                self.join(LATE)
            except Exception:  # nobody to tell: the launcher sees that this process ends
                return
        with self._lock:
            if self.joined and self.failure is None:
                self.failure = self._failed(self.rank, f"{type(error).__name__}: {_line(error)}")
                self._send({"failed": self.failure})
                if self.rank == 0:  # whoever comes to it now could not hear of it once this process has ended
                    self._lock.wait_for(lambda: len(self._others) == self.world - 1, GRACE)

    def leave(self) -> None:
        """End the watch: others may end as they like from now on."""
        self._left.set()
        if self.joined:
            self._send({"left": True})
            if self.rank:
                with contextlib.suppress(OSError):
                    self._others[0].shutdown(socket.SHUT_RDWR)

    def blamed(self, error: BaseException) -> str | None:
        """Return what failed elsewhere where that is why a call of torch's here has failed, else None."""
        if not self.joined or not (isinstance(error, dist.DistError) or type(error) is RuntimeError):
            return None
        if isinstance(error, dist.DistError) or "gloo" in str(error).lower() or "nccl" in str(error).lower():
            self._news.wait(GRACE)  # a broken connection may be seen before it is said why
        return self.failure

    # -- the line --------------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        listener = socket.create_server(("", 0), family=family, dualstack_ipv6=both, backlog=1024)
        host = os.environ.get("MASTER_ADDR") or socket.gethostname()
        token = secrets.token_hex(16)
        threading.Thread(target=self._serve, args=(listener, token), daemon=True, name="nestopt peers").start()
        self._store.set("watch", json.dumps([host, listener.getsockname()[1], token]))

    def _serve(self, listener: socket.socket, token: str) -> None:
        """Hear all others, and pass on to all of them what fails."""
        with selectors.DefaultSelector() as selector, listener:
            selector.register(listener, selectors.EVENT_READ)
            pending: dict[socket.socket, bytes] = {}
            ranks: dict[socket.socket, int] = {}
            while not self._left.is_set() or self._others:
                for key, _ in selector.select(1.0):
                    if key.fileobj is listener:
                        connection, _ = listener.accept()
                        pending[connection] = b""
                        selector.register(connection, selectors.EVENT_READ)
                        continue
                    connection = key.fileobj  # type: ignore[assignment]
                    messages, pending[connection], ended = _received(connection, pending[connection])
                    for message in messages:
                        if connection not in ranks and message.get("token") == token:
                            ranks[connection] = int(message["rank"])
                            with self._lock:
                                self._others[ranks[connection]] = connection
                                if self.failure is not None:
                                    self._send({"failed": self.failure})
                                self._lock.notify_all()
                        elif connection not in ranks:
                            ended = True  # not one of ours
                        elif "failed" in message:
                            self._heard(message["failed"])
                        elif "left" in message:
                            ranks[connection] = -1
                    if ended:
                        selector.unregister(connection)
                        rank = ranks.get(connection, -1)
                        with self._lock:
                            self._others = {r: c for r, c in self._others.items() if c is not connection}
                        connection.close()
                        if rank >= 0:
                            self._heard(self._failed(rank, _KILLED))

    def _connect(self, timeout: float) -> None:
        host, port, token = json.loads(self._store.get("watch"))
        try:
            connection = socket.create_connection((host, port), timeout=timeout)
        except OSError as error:
            raise TrainingError(f"process 0 can't be reached at {host}:{port}: {error}") from error
        connection.settimeout(None)
        self._others[0] = connection
        self._send({"token": token, "rank": self.rank})
        threading.Thread(target=self._hear, args=(connection,), daemon=True, name="nestopt peers").start()

    def _hear(self, connection: socket.socket) -> None:
        pending = b""
        while True:
            messages, pending, ended = _received(connection, pending)
            for message in messages:
                if "left" in message:
                    return
                self._heard(message["failed"])
            if ended:
                self._heard(self._failed(0, _KILLED))
                return

    def _send(self, message: dict[str, Any]) -> None:
        line = json.dumps(message).encode() + b"\n"
        with self._lock:
            for connection in self._others.values():
                with contextlib.suppress(OSError):  # it has ended already
                    connection.sendall(line)

    def _heard(self, failure: str) -> None:
        if self.failure is not None or self._left.is_set():
            return
        self.failure = failure
        if self.rank == 0:
            self._send({"failed": failure})
        self._news.set()
        threading.Thread(target=self._end, daemon=True, name="nestopt end").start()

    def _end(self) -> None:
        if not self._left.wait(GRACE):
            # the main thread waits in a collective, which nothing else ends
            print(f"nestopt: {self.failure}; process {self.rank} is ended too", file=sys.stderr, flush=True)
            os._exit(EXIT_FAILED)

    def _failed(self, rank: int, how: str) -> str:
        return f"process {rank} of {self.world} failed: {how}"


_KILLED = "it ended without a word (killed, or out of memory)"
_numbers = itertools.count()
_present: list[Watch] = []


@contextlib.contextmanager
def watching() -> Iterator[Watch]:
    """Let all processes end when one fails within this, by an exception or otherwise; within another, that one counts.

    Raises:
        TrainingError: another process failed, where that made a call of torch's fail here.
    """
    if _present:
        yield _present[0]
        return
    _present.append(watch := Watch())
    try:
        yield watch
    except BaseException as error:
        if (why := watch.blamed(error)) is not None:
            raise TrainingError(f"{why}; process {watch.rank} ends too") from error
        watch.fail(error)
        raise
    finally:
        watch.leave()
        _present.clear()


def present() -> Watch:
    """Return the watch that there is now, or one of nobody."""
    return _present[0] if _present else Watch()


def _received(connection: socket.socket, pending: bytes) -> tuple[list[dict[str, Any]], bytes, bool]:
    """Return the messages that have come whole, the rest, and whether no more can come."""
    try:
        more = connection.recv(1 << 16)
        *lines, rest = (pending + more).split(b"\n")
        return [found for line in lines if isinstance(found := json.loads(line), dict)], rest, not more
    except (OSError, ValueError):
        return [], b"", True


def differences(found: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return the keys whose values are not the same in all processes, each with who has what."""
    names = []
    for key in dict.fromkeys(key for facts in found for key in facts):
        having: dict[str, list[int]] = {}
        for rank, facts in enumerate(found):
            having.setdefault(json.dumps(facts[key]) if key in facts else "", []).append(rank)
        if len(having) > 1:
            said = ", ".join(
                f"{processes(ranks)} {'has' if len(ranks) == 1 else 'have'} "
                + (show(json.loads(value)) if value else "nothing")
                for value, ranks in having.items()
            )
            names.append((key, f"{said}; start all processes with the same"))
    return names


def processes(ranks: list[int]) -> str:
    """Return `process 3`, or `processes 0, 2, 3`; of many, the first ones."""
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"process{'' if len(ranks) == 1 else 'es'} {shown}"


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) < 2000 else text[:2000] + " …"
