"""What clients may not do to a connection; after each of them a normal client is served."""

from __future__ import annotations

import asyncio
import socket
import time

import pytest

from wemm.errors import ParameterError

pytest.importorskip("uvicorn")

from tests.server.sockets import (
    GET,
    Client,
    answer,
    application,
    assert_works,
    echo,
    respond,
    run,
    running,
)
from wemm.server.connection import ConnectionLimits

SHORT = 0.3
LONG = 1000.0


def _limits(**changes):
    """Nothing times out but what the test makes short."""
    return ConnectionLimits(**{"header_timeout": LONG, "idle_timeout": LONG, "write_timeout": LONG, **changes})


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_connections", 0), ("max_header_bytes", 1.5), ("idle_timeout", 0), ("write_timeout", float("inf")),
     ("header_timeout", float("nan")), ("max_header_count", True)],
)  # fmt: skip
def test_limits_are_numbers_that_limit(name, value):
    with pytest.raises(ParameterError, match=name):
        ConnectionLimits(**{name: value})


def test_headers_that_never_end_are_answered_with_408():
    async def test():
        async with running(answer, limits=_limits(header_timeout=SHORT)) as [url]:
            async with await Client.connect(url) as client:
                await client.send(b"GET / HTTP/1.1\r\n")
                await client.trickle(b"X: b\r\n")
                status, headers, _ = await client.response()
                assert (status, headers["connection"]) == (408, "close")
                assert await client.rest() == b""
            await assert_works(url)

    run(test)


def test_a_client_that_says_nothing_is_closed_without_a_word():
    async def test():
        async with running(answer, limits=_limits(header_timeout=SHORT)) as [url]:
            async with await Client.connect(url) as client:
                assert await client.rest() == b""
            await assert_works(url)

    run(test)


def test_the_deadline_of_headers_is_that_of_each_request():
    async def test():
        async with running(answer, limits=_limits(header_timeout=SHORT)) as [url]:
            async with await Client.connect(url) as client:
                for _ in range(3):
                    await client.send(GET)
                    assert (await client.response())[0] == 200
                    await asyncio.sleep(SHORT * 1.5)  # idling, which has a limit of its own
                await client.send(GET[:10])
                assert (await client.response())[0] == 408
            await assert_works(url)

    run(test)


def test_idle_connections_are_closed():
    async def test():
        async with running(answer, limits=_limits(idle_timeout=SHORT)) as [url]:
            async with await Client.connect(url) as client:
                await client.send(GET)
                assert (await client.response())[0] == 200
                assert await client.rest() == b""
            await assert_works(url)

    run(test)


def test_requests_share_a_connection_also_when_they_come_at_once():
    async def test():
        async with running(echo, limits=_limits()) as [url], await Client.connect(url) as client:
            posts = [b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\n%d" % i for i in range(5)]
            await client.send(b"".join(posts))
            assert [(await client.response())[2] for _ in posts] == [b"0", b"1", b"2", b"3", b"4"]
            await client.send(posts[0][:20])
            await asyncio.sleep(0.05)
            await client.send(posts[0][20:])
            assert (await client.response())[2] == b"0"

    run(test)


@pytest.mark.parametrize("in_pieces", [False, True])
@pytest.mark.parametrize(
    "headers",
    [b"X: " + b"a" * 70_000, b"".join(b"X-%d: a\r\n" % i for i in range(200))[:-2]],
    ids=["long", "many"],
)
def test_headers_are_bounded(headers, in_pieces):
    async def test():
        async with running(answer, limits=_limits()) as [url]:
            async with await Client.connect(url) as client:
                request = b"GET / HTTP/1.1\r\nHost: a\r\n" + headers + b"\r\n\r\n"
                for start in range(0, len(request), 20_000 if in_pieces else len(request)):
                    client.writer.write(request[start : start + (20_000 if in_pieces else len(request))])
                    await asyncio.sleep(0.01)
                status, _, body = await client.response()
                assert (status, body) == (431, b"at most 65536 bytes of headers in 100 lines\n")
                assert await client.rest() == b""
            await assert_works(url)

    run(test)


def test_headers_without_end_are_bounded():
    async def test():
        async with running(answer, limits=_limits()) as [url]:
            async with await Client.connect(url) as client:
                await client.send(b"GET / HTTP/1.1\r\n")
                await client.trickle(b"X: " + b"a" * 10_000 + b"\r\n")
                assert (await client.response())[0] == 431
            await assert_works(url)

    run(test)


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 200, 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\n\r\n", 501),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", 400),
    ],
)
def test_what_is_not_http_is_refused(request_bytes, status):
    async def test():
        async with running(echo, limits=_limits()) as [url]:
            async with await Client.connect(url) as client:
                await client.send(request_bytes)
                assert (await client.response())[0] == status
                assert await client.rest() == b""
            await assert_works(url)

    run(test)


def test_an_application_hears_that_the_rest_of_its_request_is_no_http():
    heard = []

    @application
    async def read(scope, receive, send):
        while (message := await receive())["type"] != "http.disconnect":
            pass
        heard.append(message)
        await respond(send, b"late")  # nobody is there

    @application
    async def begin(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await read(scope, receive, send)

    async def test():
        for app in (read, begin):
            async with running(app, limits=_limits()) as [url], await Client.connect(url) as client:
                await client.send(b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
                await asyncio.sleep(0.05)
                await client.send(b"zz\r\n")
                data = await client.rest()
                assert data.count(b"HTTP/1.1") == 1
                assert data.startswith(b"HTTP/1.1 400" if app is read else b"HTTP/1.1 200")
        assert len(heard) == 2

    run(test)


def test_a_refused_client_is_not_told_to_continue(caplog):
    heard = []

    @application
    async def late(scope, receive, send):
        await asyncio.sleep(0.1)
        heard.append((await receive())["type"])

    async def test():
        async with running(late, limits=_limits()) as [url], await Client.connect(url) as client:
            headers = b"Expect: 100-continue\r\nTransfer-Encoding: chunked\r\n"
            await client.send(b"POST / HTTP/1.1\r\nHost: a\r\n" + headers + b"\r\n")
            await asyncio.sleep(0.02)
            await client.send(b"zz\r\n")
            assert (await client.response())[0] == 400
            while not heard:
                await asyncio.sleep(0.01)

    run(test)
    assert heard == ["http.disconnect"]
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_a_body_that_was_answered_early_is_not_waited_for():
    async def test():
        async with running(answer, limits=_limits(header_timeout=SHORT)) as [url]:
            async with await Client.connect(url) as client:
                await client.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\nabc")
                assert (await client.response())[0] == 200
                with pytest.raises(ConnectionError):
                    await client.trickle(b"x")
            await assert_works(url)

    run(test)


def test_a_body_that_was_answered_early_and_still_comes_leaves_the_connection_usable():
    async def test():
        async with running(answer, limits=_limits()) as [url], await Client.connect(url) as client:
            await client.send(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 300000\r\n\r\nabc")
            assert (await client.response())[0] == 200
            await client.send(b"x" * (300_000 - 3) + GET)
            assert (await client.response())[0] == 200

    run(test)


@pytest.mark.parametrize("chunk", [100, 2**16])
def test_a_client_that_does_not_read_is_left(chunk):
    """Also where each message is small: the client's own buffer is the only one that it can fill."""
    ended, num_sent = [], 0

    @application
    async def endless(scope, receive, send):
        nonlocal num_sent
        if scope["path"] != "/endless":
            await respond(send, b"ok")
            return
        await receive()
        listener = asyncio.ensure_future(receive())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while not listener.done():
            for _ in range(2**16 // chunk):
                await send({"type": "http.response.body", "body": b"x" * chunk, "more_body": True})
                num_sent += 0 if listener.done() else chunk
            await asyncio.sleep(0)
        ended.append(listener.result()["type"])

    async def test():
        limits = _limits(write_timeout=SHORT)
        async with running(endless, limits=limits) as [url], await Client.connect(url, limit=2**10) as client:
            await client.send(GET.replace(b"/ ", b"/endless "))
            while not ended:
                await asyncio.sleep(0.02)
                await assert_works(url)
            assert ended == ["http.disconnect"]
            assert num_sent - (await client.rest()).count(b"x") <= 4 * chunk

    run(test)


def test_a_finished_response_that_nobody_takes_does_not_stay():
    """The application has ended, the connection is closing: what is left of the answer must not keep it."""

    @application
    async def large(scope, receive, send):
        await respond(send, b"x" * 20_000_000 if scope["path"] == "/large" else b"ok")

    async def test():
        limits = _limits(write_timeout=SHORT, max_connections=1)
        for header in (b"", b"Connection: close\r\n"):
            async with running(large, limits=limits) as [url], await Client.connect(url, limit=2**10) as client:
                await client.send(b"GET /large HTTP/1.1\r\nHost: a\r\n" + header + b"\r\n")
                await asyncio.sleep(SHORT * 3)
                await assert_works(url)
                assert len(await client.rest()) < 20_000_000

    run(test)


async def _connect_with_a_small_buffer(url):
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**12)
    client.setblocking(False)
    await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", int(url.rpartition(":")[2])))
    return client


def test_a_slow_reader_is_served_to_the_end():
    size = 20_000_000

    @application
    async def large(scope, receive, send):
        await respond(send, b"x" * size if scope["path"] == "/large" else b"ok")

    async def test():
        loop, timeout = asyncio.get_running_loop(), 0.5
        async with running(large, limits=_limits(write_timeout=timeout)) as [url]:
            with await _connect_with_a_small_buffer(url) as client:
                started, num_read, next_pause = time.monotonic(), 0, 0
                await loop.sock_sendall(client, GET.replace(b"/ ", b"/large "))
                while num_read < size:
                    num_read += len(await loop.sock_recv(client, 2**16))
                    if num_read > next_pause:
                        next_pause = num_read + size // 20
                        await asyncio.sleep(timeout / 8)
                assert time.monotonic() - started > 2 * timeout
                await asyncio.sleep(timeout * 2.5)  # what was slow once is not held against it
                await loop.sock_sendall(client, GET)
                assert (await loop.sock_recv(client, 2**16)).startswith(b"HTTP/1.1 200")

    run(test)


@pytest.mark.parametrize("pace", ["next to nothing", "all, and then nothing"])
def test_a_reader_that_takes_too_little_is_left(pace):
    size = 20_000_000

    @application
    async def large(scope, receive, send):
        await respond(send, b"x" * size if scope["path"] == "/large" else b"ok")

    async def test():
        loop = asyncio.get_running_loop()
        async with running(large, limits=_limits(write_timeout=SHORT)) as [url]:
            with await _connect_with_a_small_buffer(url) as client:
                await loop.sock_sendall(client, GET.replace(b"/ ", b"/large "))
                num_read, started = 0, time.monotonic()
                while time.monotonic() - started < SHORT * 4:
                    num_read += len(await loop.sock_recv(client, 500 if pace == "next to nothing" else 100_000))
                    await asyncio.sleep(0.02 if pace == "next to nothing" else 0.002)
                if pace != "next to nothing":
                    assert num_read > 500_000
                    await asyncio.sleep(SHORT * 4)
                while data := await loop.sock_recv(client, 2**16):
                    num_read += len(data)
                assert num_read < size
            await assert_works(url)

    run(test)


def test_a_flood_of_idle_connections_gives_way_to_who_asks():
    async def test():
        async with running(answer, limits=_limits(max_connections=4)) as [url]:
            idle = []
            for i in range(12):
                idle.append(await Client.connect(url))
                if i % 2:
                    await idle[i].send(GET)
                    assert (await idle[i].response())[0] == 200
            for _ in range(3):
                await assert_works(url)
            assert await idle[0].rest() == b""
            kept = idle[-1]  # the last to come is the last to go
            await kept.send(GET)
            assert (await kept.response())[0] == 200
            for client in idle:
                await client.__aexit__()

    run(test)


def test_more_busy_connections_than_allowed_get_503():
    go = asyncio.Event()

    @application
    async def slow(scope, receive, send):
        await go.wait()
        await respond(send, b"ok")

    async def test():
        async with running(slow, limits=_limits(max_connections=3)) as [url]:
            busy = [await Client.connect(url) for _ in range(3)]
            for client in busy:
                await client.send(GET)
            await asyncio.sleep(0.05)
            for _ in range(100):  # more than may linger
                async with await Client.connect(url) as client:
                    await client.send(GET)
                    status, headers, body = await client.response()
                    assert (status, headers["retry-after"], headers["connection"]) == (503, "1", "close")
                    assert body == b"too many connections; try again later\n"
            go.set()
            for client in busy:
                assert (await client.response())[2] == b"ok"
                await client.__aexit__()
            await assert_works(url)

    run(test)


def test_refused_connections_take_no_place_and_give_none():
    go = asyncio.Event()

    @application
    async def slow(scope, receive, send):
        await go.wait()
        await respond(send, b"ok")

    async def test():
        async with running(slow, limits=_limits(max_connections=1)) as [url]:
            rude = [await Client.connect(url) for _ in range(3)]
            for client in rude[::-1]:
                await client.send(b"nonsense\r\n\r\n")
            assert (await rude[2].response())[0] == 400
            async with await Client.connect(url) as busy:
                await busy.send(GET)
                await asyncio.sleep(0.05)
                async with await Client.connect(url) as too_many:
                    assert (await too_many.response())[0] == 503
                go.set()
                assert (await busy.response())[2] == b"ok"
            for client in rude:
                await client.__aexit__()

    run(test)


def test_a_refused_client_may_end_in_peace(monkeypatch):
    """The answer ends the service's half of the connection; what still comes breaks nothing."""
    monkeypatch.setattr("wemm.server.connection._LINGER_SECONDS", LONG)
    monkeypatch.setattr("wemm.server.connection._MAX_LINGERING", 1)

    async def test():
        async with running(answer, limits=_limits()) as [url]:
            for _ in range(5):
                async with await Client.connect(url) as client:
                    await client.send(b"nonsense\r\n\r\n")
                    assert (await client.response())[0] == 400
                    assert await client.rest() == b""
                    for _ in range(3):
                        await client.send(b"x")
                        await asyncio.sleep(0.01)
            await assert_works(url)

    run(test)


def test_a_refused_client_that_goes_on_sending_is_cut_off():
    go = asyncio.Event()

    @application
    async def slow(scope, receive, send):
        await go.wait()
        await respond(send, b"ok")

    async def test():
        async with running(slow, limits=_limits(max_connections=1)) as [url], await Client.connect(url) as busy:
            await busy.send(GET)
            await asyncio.sleep(0.05)
            async with await Client.connect(url) as client:
                assert (await client.response())[0] == 503
                with pytest.raises(ConnectionError):
                    await client.trickle(b"x")
            go.set()
            assert (await busy.response())[2] == b"ok"

    run(test)


def test_an_upgrade_is_answered_as_if_it_were_none(caplog):
    async def test():
        async with running(answer, limits=_limits()) as [url], await Client.connect(url) as client:
            await client.send(
                b"GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
                b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
            )
            assert (await client.response())[0] == 200

    run(test)
    assert caplog.records == []
