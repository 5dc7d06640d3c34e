"""The engine in a process of its own, seen from the door: start it, give it orders, hear its reports.

What crosses is pickled, between two processes of the same program that nobody else can reach: a pair of
connected sockets, one end of which the child inherits. Orders are calls on the engine by name; reports are the
dataclasses below. The child ends when its end of the pair closes, however the parent ends; when the child ends
unasked, the door hears of it as EngineDeadError.
"""

from __future__ import annotations

import contextlib
import logging
import pickle
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any

from wemm.config import EngineConfig
from wemm.engine.engine import EngineStats
from wemm.errors import EngineDeadError, EngineError, WemmError
from wemm.progress import Advance, ProgressBar
from wemm.request import RequestOutput

_EXIT_SECONDS = 10
_STATUS_OF_FOLLOWERS = 0


@dataclass(frozen=True)
class Began:
    """Long work began: (description, total, unit) of its bar. It ends when more begins or the engine is up."""

    bar: tuple[str, int | None, str]


@dataclass(frozen=True)
class Advanced:
    """It came forward by so much."""

    amount: int


@dataclass(frozen=True)
class Started:
    """The engine is up: what it has room for."""

    max_model_len: int
    dtype: str
    stats: EngineStats


@dataclass(frozen=True)
class Stepped:
    """What is new since the last such report: outputs are deltas, without prompt tokens after the first."""

    outputs: tuple[RequestOutput, ...]
    stats: EngineStats


@dataclass(frozen=True)
class Checked:
    """Answer to the order `check_integrity`."""

    error: WemmError | None


@dataclass(frozen=True)
class Logged:
    """A log record, to be written where and how the door writes its own."""

    logger: str
    level: int
    message: str


@dataclass(frozen=True)
class Ended:
    """The engine has come to its end, or never began."""

    error: WemmError


Report = Stepped | Checked | Ended
"""What concerns requests."""


class Pipe:
    """Pickled objects over a connected socket.

    Plainly pickled: multiprocessing's own way would send tensors as descriptors of shared memory. Any thread may
    send, one receives.
    """

    def __init__(self, descriptor: int) -> None:
        self._connection = Connection(descriptor)
        self._sending = threading.Lock()

    def send(self, value: Any) -> None:
        """Raises OSError if the other end is gone."""
        self.send_pickled(pickle.dumps(value, pickle.HIGHEST_PROTOCOL))

    def send_pickled(self, value: bytes) -> None:
        """The same for what is pickled already."""
        with self._sending:
            self._connection.send_bytes(value)

    def receive(self) -> Any:
        """Waits. Raises EOFError or OSError if the other end is gone."""
        return pickle.loads(self._connection.recv_bytes())

    def close(self) -> None:
        """This end."""
        self._connection.close()


class EngineProcess:
    """A started engine. Reports come in a thread of their own."""

    def __init__(self, config: EngineConfig, progress: ProgressBar) -> None:
        """Start it and wait until it is up. Raises what `LLM` raises."""
        ours, theirs = socket.socketpair()
        with ours, theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "wemm.engine.engine_host", str(theirs.fileno())], pass_fds=[theirs.fileno()]
            )
            self._pipe = Pipe(ours.detach())
        self._orders: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._closing = False
        try:
            self._pipe.send(asdict(config))
            self.started: Started = self._wait_until_up(progress)
        except BaseException:
            self._process.kill()
            self._process.wait()
            self._pipe.close()
            raise
        self._sender = threading.Thread(target=self._send, name="wemm-orders", daemon=True)
        self._receiver: threading.Thread | None = None

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def listen(self, report: Callable[[Report], None]) -> None:
        """From now on hand every report over, the last one an `Ended`."""
        self._receiver = threading.Thread(target=self._receive, args=(report,), name="wemm-reports", daemon=True)
        self._sender.start()
        self._receiver.start()

    def order(self, name: str, *arguments: Any) -> None:
        """Call a method of the engine before its next step. Never waits for it."""
        # Pickled here, so that what cannot be is the caller's to hear of.
        self._orders.put(pickle.dumps((name, arguments), pickle.HIGHEST_PROTOCOL))

    def close(self) -> None:
        """End it and wait."""
        self._closing = True
        self._orders.put(None)
        try:
            self._process.wait(_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._receiver is not None and self._receiver is not threading.current_thread():
            self._receiver.join()
        self._pipe.close()

    def _wait_until_up(self, progress: ProgressBar) -> Started:
        bar: AbstractContextManager[Advance] = contextlib.nullcontext(lambda amount: None)
        advance = bar.__enter__()
        try:
            while True:
                report = self._pipe.receive()
                if isinstance(report, Began):
                    bar.__exit__(None, None, None)
                    bar = progress(*report.bar)
                    advance = bar.__enter__()
                elif isinstance(report, Advanced):
                    advance(report.amount)
                elif isinstance(report, Logged):
                    _log(report)
                elif isinstance(report, Ended):
                    raise report.error
                else:
                    return report
        except (EOFError, OSError):
            status = self._process.wait()
            if status == _STATUS_OF_FOLLOWERS:
                raise SystemExit(0) from None  # torchrun started us as a rank that only follows
            raise EngineDeadError(f"the engine's process {_how(status)} while it started") from None
        finally:
            bar.__exit__(None, None, None)

    def _send(self) -> None:
        while True:
            order = self._orders.get()
            try:
                if order is None:
                    self._pipe.send(None)
                    return
                self._pipe.send_pickled(order)
            except OSError:  # it has ended: the receiver says so
                return

    def _receive(self, report: Callable[[Report], None]) -> None:
        try:
            while True:
                received = self._pipe.receive()
                if isinstance(received, Logged):
                    _log(received)
                    continue
                report(received)
                if isinstance(received, Ended):
                    return
        except (EOFError, OSError):
            report(Ended(self._end()))
        finally:
            self._orders.put(None)  # let the sender end

    def _end(self) -> EngineError:
        if self._closing:
            return EngineError("this AsyncLLM is closed")
        try:
            status = self._process.wait(_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        return EngineDeadError(f"the engine's process {_how(status)}; what it had under way is lost")


def _log(record: Logged) -> None:
    logging.getLogger(record.logger).log(record.level, record.message)


def _how(status: int) -> str:
    return f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
