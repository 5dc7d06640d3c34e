"""A service on real sockets in the test's own event loop, and clients that are as rude as they like."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

from wemm.server.connection import ConnectionLimits
from wemm.server.listen import Listener, serve

PATIENCE = 30.0  # of a loaded machine; no test waits for it to pass


def application(handle: Callable[[Any, Any, Any], Awaitable[None]]) -> Any:
    """An ASGI application of one function, with a lifespan."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await handle(scope, receive, send)
            return
        for phase in ("startup", "shutdown"):
            assert (await receive())["type"] == f"lifespan.{phase}"
            await send({"type": f"lifespan.{phase}.complete"})

    return app


async def respond(send: Any, body: bytes, status: int = 200) -> None:
    headers = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


@application
async def answer(scope: Any, receive: Any, send: Any) -> None:
    """ok, whatever is asked and whatever comes after it."""
    await respond(send, b"ok")


@application
async def echo(scope: Any, receive: Any, send: Any) -> None:
    """The body, or ok where there is none."""
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        body, more = body + message["body"], message["more_body"]
    await respond(send, body or b"ok")


@asynccontextmanager
async def running(*apps: Any, limits: ConnectionLimits | None = None, **options: Any) -> AsyncIterator[list[str]]:
    """The URLs of one listener for each app, or listener, while the block runs."""
    started: asyncio.Future[list[str]] = asyncio.get_running_loop().create_future()
    listeners = [app if isinstance(app, Listener) else Listener(app, "127.0.0.1", 0) for app in apps]
    options = {"drain_timeout": 5.0, "on_drain": lambda: None, **options}
    task = asyncio.ensure_future(
        serve(
            listeners,
            limits=limits or ConnectionLimits(),
            on_started=lambda urls: started.set_result(list(urls)),
            **options,
        )
    )
    try:
        await asyncio.wait({task, started}, return_when=asyncio.FIRST_COMPLETED)
        yield await started if started.done() else await task
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


class Client:
    """A connection that sends what it is told and nothing else."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def connect(cls, url: str, **options: Any) -> Client:
        host, _, port = url.partition("://")[2].rpartition(":")
        return cls(*await asyncio.open_connection(host.strip("[]"), int(port), **options))

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.writer.close()
        with suppress(OSError):
            await self.writer.wait_closed()

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def trickle(self, piece: bytes) -> None:
        """Send the piece again and again, until there is an answer; raises if the connection breaks instead."""
        while not self.reader._buffer:
            await self.send(piece)
            await asyncio.sleep(0.02)

    async def response(self) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of a response that has a length or is chunked."""
        return await asyncio.wait_for(self._response(), PATIENCE)

    async def _response(self) -> tuple[int, dict[str, str], bytes]:
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        status, *lines = head.strip().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        if "content-length" in headers:
            body = await self.reader.readexactly(int(headers["content-length"]))
        else:
            assert headers["transfer-encoding"] == "chunked", head
            body = b""
            while size := int(await self.reader.readuntil(b"\r\n"), 16):
                body += (await self.reader.readexactly(size + 2))[:-2]
            await self.reader.readexactly(2)
        return int(status.split()[1]), headers, body

    async def rest(self) -> bytes:
        """All that comes until the service closes the connection, however it does."""
        data = bytearray()

        async def read() -> None:
            with suppress(ConnectionError):
                while chunk := await self.reader.read(2**16):
                    data.extend(chunk)

        await asyncio.wait_for(read(), PATIENCE)
        return bytes(data)


GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"


async def assert_works(url: str, **options: Any) -> None:
    """A normal request is answered."""
    async with await Client.connect(url, **options) as client:
        await client.send(GET)
        status, _, body = await client.response()
        assert (status, body) == (200, b"ok")


def run(test: Callable[[], Awaitable[None]]) -> None:
    """Run it in an event loop, for as long as patience lasts; nothing may fail behind its back."""
    failures: list[dict[str, Any]] = []

    async def watched() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: failures.append(context))
        await asyncio.wait_for(test(), PATIENCE)

    asyncio.run(watched())
    assert failures == []
