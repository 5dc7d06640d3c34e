"""One HTTP/1.1 connection: uvicorn's protocol, with the deadlines and bounds that uvicorn lacks.

A connection either waits (for a request's headers, however few of them have come) or is busy with one request
until its response is complete. Waiting has a deadline, and a waiting connection is closed for a newer one when
there are too many. The body of a request is the application's affair (body.py), reading the response the
client's: it must take some of it within every `write_timeout`.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from wemm.config import option
from wemm.errors import ParameterError

_LINGER_SECONDS = 1.0
_MAX_LINGERING = 64
_RETRY_SECONDS = 1


@dataclass(frozen=True)
class ConnectionLimits:
    """What one listener grants its connections. Times in seconds."""

    max_connections: int = option(1024, "Connections open at once at most; more are answered with 503.")
    header_timeout: float = option(10.0, "From connecting, or from the first byte after idling, to full headers.")
    idle_timeout: float = option(75.0, "Between two requests on one connection.")
    write_timeout: float = option(60.0, "In which a client must take some of its response.")
    max_header_bytes: int = option(64 * 1024, "Request line and headers together.")
    max_header_count: int = option(100, "Header lines of one request.")

    def __post_init__(self) -> None:
        for name in ("max_connections", "max_header_bytes", "max_header_count"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ParameterError(f"{name} must be an integer >= 1. Given: {value!r}")
        for name in ("header_timeout", "idle_timeout", "write_timeout"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
                raise ParameterError(f"{name} must be a number of seconds > 0. Given: {value!r}")


class Occupancy:
    """Who of one listener's connections waits, and who lingers after a refusal."""

    def __init__(self, limits: ConnectionLimits) -> None:
        self.limits = limits
        self.waiting: dict[BoundedConnection, None] = {}
        """In the order in which they began to wait."""
        self.lingering: set[asyncio.Transport] = set()

    def make_room(self, num_open: int) -> bool:
        """Whether one more may come; the one that has waited longest goes for it."""
        if num_open < self.limits.max_connections:
            return True
        longest = next(iter(self.waiting), None)
        if longest is not None:
            longest.evict()
        return longest is not None


class _Parser(h11.Connection):
    """h11 bounds what is incomplete; headers that arrive whole in one piece are counted here."""

    def __init__(self, limits: ConnectionLimits) -> None:
        super().__init__(h11.SERVER, limits.max_header_bytes)
        self._limits = limits
        self.refusal = HTTPStatus.BAD_REQUEST

    def next_event(self) -> Any:
        """As h11's; a failure leaves its status in `refusal`."""
        try:
            if self.their_state is h11.IDLE:
                head = self.trailing_data[0].partition(b"\r\n\r\n")[0]
                if b"\n" in head.replace(b"\r\n", b""):
                    # To h11 the end of a line; a proxy before us may have taken two lines for one.
                    raise h11.RemoteProtocolError("a line feed alone", error_status_hint=400)
            event = super().next_event()
            if isinstance(event, h11.Request):
                self._check(event)
        except h11.RemoteProtocolError as error:
            self.refusal = HTTPStatus(error.error_status_hint)
            raise
        return event

    def _check(self, request: h11.Request) -> None:
        num_bytes = len(request.target) + sum(len(name) + len(value) + 4 for name, value in request.headers)
        if num_bytes > self._limits.max_header_bytes or len(request.headers) > self._limits.max_header_count:
            raise h11.RemoteProtocolError("too many headers", error_status_hint=431)
        if {b"content-length", b"transfer-encoding"} <= {name for name, _ in request.headers}:
            # Two lengths: a proxy before us may have believed the other one.
            raise h11.RemoteProtocolError("two lengths", error_status_hint=400)


class _Deadline:
    """A moment after which something is done, unless it is put off or called off."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._timer: asyncio.TimerHandle | None = None

    @property
    def is_set(self) -> bool:
        """Whether something will be done."""
        return self._timer is not None

    def set(self, seconds: float, then: Callable[[], None]) -> None:
        """From now on; what was set before is called off."""
        self.cancel()
        self._timer = self._loop.call_later(seconds, then)

    def cancel(self) -> None:
        """Nothing is done."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class _Lingering(asyncio.Protocol):
    """A refused connection: discards what still comes, for closing at once could destroy the answer on its way."""

    def __init__(self, transport: asyncio.Transport, occupancy: Occupancy) -> None:
        self._transport = transport
        self._lingering = occupancy.lingering
        if transport.is_closing() or len(self._lingering) >= _MAX_LINGERING:
            transport.abort()
            return
        self._lingering.add(transport)
        self._deadline = asyncio.get_running_loop().call_later(_LINGER_SECONDS, transport.abort)
        transport.set_protocol(self)
        if transport.can_write_eof():
            transport.write_eof()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has closed, or its time is over."""
        self._deadline.cancel()
        self._lingering.discard(self._transport)


class BoundedConnection(H11Protocol):
    """One client's connection."""

    def __init__(
        self, config: Config, server_state: ServerState, app_state: dict[str, Any], occupancy: Occupancy
    ) -> None:
        super().__init__(config, server_state, app_state)
        self._limits = occupancy.limits
        self._occupancy = occupancy
        self._parser = _Parser(self._limits)
        self.conn = self._parser
        self.timeout_keep_alive = self._limits.idle_timeout  # type: ignore[assignment]  # fractions are welcome
        self._deadline = _Deadline(self.loop)
        """Of waiting for headers; once the connection closes, of closing."""
        self._is_ending = False
        self._is_left = False
        self._write_deadline = _Deadline(self.loop)
        self._num_untaken = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        if not self._occupancy.make_room(len(self.connections)):
            self.transport = transport
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, "too many connections; try again later")
            return
        super().connection_made(transport)
        # Nothing is buffered beyond what the socket takes, so that paused means: the client takes nothing more.
        transport.set_write_buffer_limits(high=1, low=0)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """Bytes of a request."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """The application has ended its response."""
        super().on_response_complete()
        self._watch()

    def shutdown(self) -> None:
        """Close when the request under way, if any, is answered."""
        super().shutdown()
        self._watch()

    def timeout_keep_alive_handler(self) -> None:
        """Nothing came within `idle_timeout`."""
        super().timeout_keep_alive_handler()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone."""
        self._leave()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client takes no more for now."""
        super().pause_writing()
        self._watch_writing()

    def resume_writing(self) -> None:
        """The client has taken everything."""
        super().resume_writing()
        self._write_deadline.cancel()

    def evict(self) -> None:
        """Close at once: the place is needed."""
        self._leave()
        self.transport.abort()

    def send_400_response(self, msg: str) -> None:
        """What arrives is not HTTP, or more than is allowed."""
        limits = self._limits
        if self._parser.refusal is HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE:
            msg = f"at most {limits.max_header_bytes} bytes of headers in {limits.max_header_count} lines"
        self._refuse(self._parser.refusal, msg)

    def _unsupported_upgrade_warning(self) -> None:
        # Such requests are answered as if they had not asked; uvicorn's advice to install more is wrong here.
        pass

    def _watch(self) -> None:
        """Let the deadline be that of the state the connection is in now."""
        if self._is_left:
            return
        if self.transport.is_closing():
            if not self._is_ending:
                self._is_ending = True
                self._deadline.set(self._limits.write_timeout, self.transport.abort)
        elif self.cycle is not None and not self.cycle.response_complete:
            self._occupancy.waiting.pop(self, None)
            self._deadline.cancel()
        else:
            # Also while the rest of a body is discarded that was answered early.
            self._occupancy.waiting.setdefault(self)
            if self.timeout_keep_alive_task is None and not self._deadline.is_set:
                self._deadline.set(self._limits.header_timeout, self._headers_late)

    def _headers_late(self) -> None:
        if self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]:
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, f"no full headers within {self._limits.header_timeout:g} s")
        else:
            self.transport.abort()

    def _watch_writing(self) -> None:
        self._num_untaken = self.transport.get_write_buffer_size()
        self._write_deadline.set(self._limits.write_timeout, self._write_late)

    def _write_late(self) -> None:
        if self.transport.get_write_buffer_size() < self._num_untaken:
            self._watch_writing()
        else:
            self.transport.abort()

    def _refuse(self, status: HTTPStatus, message: str) -> None:
        """Answer in the application's place, and close."""
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True
            self.cycle.waiting_for_100_continue = False
            self.cycle.message_event.set()
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()  # one answer has begun already
            return
        body = f"{message}\n".encode("ascii")
        head = f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: text/plain; charset=utf-8\r\n"
        if status is HTTPStatus.SERVICE_UNAVAILABLE:
            head += f"retry-after: {_RETRY_SECONDS}\r\n"
        head += f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self.transport.write(head.encode("ascii") + body)
        self._leave()
        _Lingering(self.transport, self._occupancy)

    def _leave(self) -> None:
        self._is_left = True
        self.connections.discard(self)
        self._occupancy.waiting.pop(self, None)
        self._deadline.cancel()
        self._write_deadline.cancel()
        self._unset_keepalive_if_required()
