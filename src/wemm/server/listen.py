"""Sockets, TLS, signals: several ASGI applications served in one event loop, from binding to the last answer."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from wemm.errors import ParameterError
from wemm.server.connection import BoundedConnection, ConnectionLimits, Occupancy
from wemm.server.lifespan import Lifespan, done_before
from wemm.server.tls import TlsConfig

if sys.platform != "win32":
    import resource

__all__ = ["Listener", "TlsConfig", "serve"]

_POLL_SECONDS = 0.05
_GRACE_SECONDS = 1.0
"""What a cancelled request may take to end."""
_SEND_BUFFER_BYTES = 2**18
"""Of one connection, in the system. Without a limit megabytes are sent before it shows that nobody reads them."""
_OTHER_FILES = 256
"""Open files beside the connections: libraries, weights, pipes, connections being refused."""


@dataclass(frozen=True)
class Listener:
    """One application at one address."""

    app: ASGIApp
    host: str
    port: int
    """0: any free one."""
    tls: TlsConfig | None = None


async def serve(
    listeners: Sequence[Listener],
    *,
    limits: ConnectionLimits,
    drain_timeout: float,
    on_started: Callable[[Sequence[str]], None],
    on_drain: Callable[[], None],
    allow_public: bool = False,
) -> None:
    """Serve until SIGTERM or SIGINT, then let the requests under way finish within `drain_timeout`.

    The first listener's application gets the ASGI lifespan; requests are taken when its startup is complete.
    `on_started` gets the URLs, in the order of the listeners. A second signal ends everything at once. Raises
    ParameterError before anything has started if an address or a TLS file cannot be used, and whatever the
    application raises in its lifespan.
    """
    _allow_open_files(limits.max_connections * len(listeners) + _OTHER_FILES)
    with ExitStack() as stack:
        servers = [_Server(listener, limits) for listener in listeners]
        for server in servers:
            server.sockets = _bind(server.listener.host, server.listener.port, allow_public)
            for bound in server.sockets:
                stack.callback(bound.close)
        signals = stack.enter_context(_signals())
        lifespan = Lifespan(listeners[0].app)
        try:
            if not await done_before(signals.stop, lifespan.startup()):
                return
            for server in servers:
                await server.start(lifespan.state if server is servers[0] else {})
            on_started([server.url for server in servers])
            await signals.stop.wait()
            on_drain()
            for server in servers:
                server.stop_accepting()
            await _drain(servers, drain_timeout, signals.hurry)
        finally:
            # All servers first: requests of any of them may use what the first application's lifespan holds.
            await _end(servers)
            await lifespan.shutdown(signals.hurry)


def _allow_open_files(wanted: int) -> None:
    if sys.platform == "win32":
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise ParameterError(
            f"the connections need {wanted} open files, this process may have {hard}; lower --max-connections or "
            "raise the limit (ulimit -n)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _bind(host: str, port: int, allow_public: bool) -> list[socket.socket]:
    """A socket for every address of the host, all with the same port. Raises ParameterError."""
    if isinstance(port, bool) or not isinstance(port, int) or not 0 <= port <= 65535:
        raise ParameterError(f"a port is an integer from 0 to 65535. Given: {port!r}")
    try:
        found = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM) if host else []
    except (OSError, UnicodeError):
        found = []
    if not found:
        raise ParameterError(f"host {host!r} has no address; give an IP address or a name of this machine")
    addresses = list(dict.fromkeys((family, address) for family, _, _, _, address in found))
    if not allow_public and any(_is_wildcard(str(address[0])) for _, address in addresses):
        raise ParameterError(
            f"host {host!r} is reachable from all networks; give the address of one, or --allow-public with "
            "API keys and TLS"
        )
    sockets: list[socket.socket] = []
    failures: list[OSError] = []
    with ExitStack() as stack:
        for family, address in addresses:
            if sockets and port == 0:
                address = (address[0], sockets[0].getsockname()[1], *address[2:])
            try:
                sockets.append(_bound(family, address))
                stack.callback(sockets[-1].close)
            except OSError as error:
                failures.append(error)
        # A name may have an address of a family that is off on this machine; in use is another matter.
        fatal = [error for error in failures if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)]
        if fatal or not sockets:
            raise _unusable(host, port, (fatal or failures)[0])
        stack.pop_all()
    return sockets


def _bound(family: int, address: Any) -> socket.socket:
    with ExitStack() as stack:
        # Of a named protocol: asyncio sets TCP_NODELAY on no other, and answers would wait for an ACK.
        bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        stack.callback(bound.close)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind(address)
        stack.pop_all()
    return bound


def _is_wildcard(address: str) -> bool:
    parsed = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(parsed, "ipv4_mapped", None)
    return parsed.is_unspecified or (mapped is not None and mapped.is_unspecified)


def _unusable(host: str, port: int, error: OSError) -> ParameterError:
    remedies = {
        errno.EADDRINUSE: "stop what listens there, or give another port (0 takes a free one)",
        errno.EACCES: "ports below 1024 are privileged; give a higher one",
        errno.EADDRNOTAVAIL: "give an address of this machine",
    }
    remedy = remedies.get(error.errno or 0, "give another address")
    return ParameterError(f"cannot listen on {host}:{port}: {os.strerror(error.errno or 0)}; {remedy}")


class _Server(uvicorn.Server):
    """One listener and its connections. Of uvicorn's server only the state and the clock of responses are used."""

    def __init__(self, listener: Listener, limits: ConnectionLimits) -> None:
        """Read the TLS files. Raises ParameterError."""
        context = listener.tls.context() if listener.tls is not None else None
        super().__init__(
            uvicorn.Config(
                listener.app, interface="asgi3", lifespan="off", ws="none", log_config=None, access_log=False,
                proxy_headers=False, server_header=False, http=BoundedConnection,
            )
        )  # fmt: skip
        self.config.load()
        self.config.ssl = context
        self.listener = listener
        self.sockets: list[socket.socket] = []
        self.occupancy = Occupancy(limits)
        self.servers: list[asyncio.Server] = []
        self._clock: asyncio.Task[None] | None = None

    async def start(self, app_state: dict[str, Any]) -> None:
        """Accept connections. Raises ParameterError."""
        context = self.config.ssl

        def connection() -> BoundedConnection:
            return BoundedConnection(self.config, self.server_state, app_state, self.occupancy)

        loop = asyncio.get_running_loop()
        tls: dict[str, Any] = {}
        if context is not None:
            tls = {"ssl": context, "ssl_handshake_timeout": self.occupancy.limits.header_timeout}
            if sys.version_info >= (3, 11):
                # A client that is idle hears of the end of its connection, and answers, much later.
                tls["ssl_shutdown_timeout"] = _GRACE_SECONDS
        for bound in self.sockets:
            try:
                self.servers.append(
                    await loop.create_server(connection, sock=bound, backlog=self.config.backlog, **tls)
                )
            except OSError as error:  # two may bind the same address, and only one listen
                raise _unusable(self.listener.host, self.listener.port, error) from None
        self._clock = loop.create_task(self.main_loop())

    @property
    def url(self) -> str:
        """Where clients find the listener."""
        host = self.listener.host.strip("[]")
        scheme = "http" if self.listener.tls is None else "https"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{self.sockets[0].getsockname()[1]}"

    @property
    def is_busy(self) -> bool:
        """Whether requests are under way or answers still on their way out."""
        return bool(self.server_state.tasks or self.server_state.connections)

    def stop_accepting(self) -> None:
        """Close the sockets, and every connection when its request under way is answered."""
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()

    def abort(self) -> None:
        """Close every connection now."""
        for server in self.servers:
            server.close()
        if self._clock is not None:
            self._clock.cancel()
        for connection in list(self.server_state.connections):
            connection.transport.abort()
        for transport in list(self.occupancy.lingering):
            transport.abort()


async def _drain(servers: Sequence[_Server], timeout: float, hurry: asyncio.Event) -> None:
    deadline = time.monotonic() + timeout
    while any(server.is_busy for server in servers) and time.monotonic() < deadline and not hurry.is_set():
        await asyncio.sleep(_POLL_SECONDS)


async def _end(servers: Sequence[_Server]) -> None:
    for server in servers:
        server.abort()
    await asyncio.sleep(0)  # in which the connections hear of it
    tasks = {task for server in servers for task in server.server_state.tasks}
    if tasks:
        # An application that listens for the disconnect ends by itself and has nothing to complain about.
        _, late = await asyncio.wait(tasks, timeout=_GRACE_SECONDS)
        for task in late:
            task.cancel()
        if late:
            await asyncio.wait(late, timeout=_GRACE_SECONDS)


@dataclass(frozen=True)
class _Signals:
    stop: asyncio.Event
    hurry: asyncio.Event

    def arrived(self) -> None:
        (self.hurry if self.stop.is_set() else self.stop).set()


@contextmanager
def _signals() -> Iterator[_Signals]:
    signals = _Signals(asyncio.Event(), asyncio.Event())
    loop = asyncio.get_running_loop()
    handled = []
    for number in (signal.SIGTERM, signal.SIGINT):
        # Outside the main thread nobody can: whoever started the loop there ends the task.
        with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
            loop.add_signal_handler(number, signals.arrived)
            handled.append(number)
    try:
        yield signals
    finally:
        for number in handled:
            loop.remove_signal_handler(number)
