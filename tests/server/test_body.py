"""Bodies whole or not at all, cancellation when the client leaves, and JSON to the letter."""

from __future__ import annotations

import asyncio
import json
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wemm.errors import ClientError

pytest.importorskip("uvicorn")

from tests.server.sockets import Client, application, assert_works, echo, respond, run, running
from wemm.server.body import MAX_JSON_ITEMS, BodyLimit, InvalidJsonError, parse_json

POST = b"POST / HTTP/1.1\r\nHost: a\r\n"
LIMIT = 1000
SHORT = 0.3


def _status(response):
    status, _, body = response
    return status, json.loads(body)["error"]["code"], json.loads(body)["error"]["message"]


def test_a_body_within_the_limit_arrives_whole():
    bodies = []

    @application
    async def app(scope, receive, send):
        bodies.append(await receive())
        await respond(send, b"ok")

    async def test():
        async with running(BodyLimit(app, LIMIT)) as [url], await Client.connect(url) as client:
            await client.send(POST + b"Content-Length: 1000\r\n\r\n" + b"a" * 400)
            await asyncio.sleep(0.05)
            await client.send(b"a" * 600)
            assert (await client.response())[0] == 200
            await client.send(POST + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\nb\r\n" * 1000 + b"0\r\n\r\n")
            assert (await client.response())[0] == 200
            await client.send(POST + b"\r\n")
            assert (await client.response())[0] == 200

    run(test)
    assert bodies == [
        {"type": "http.request", "body": body, "more_body": False} for body in (b"a" * 1000, b"b" * 1000, b"")
    ]


@pytest.mark.parametrize(
    ("head", "size"),
    [
        (b"Content-Length: 1001\r\n\r\n", "1001"),
        (b"Content-Length: 209715200\r\n\r\n" + b"a" * 5000, "209715200"),
        (b"Content-Length: 1001\r\nExpect: 100-continue\r\n\r\n", "1001"),
        (b"Transfer-Encoding: chunked\r\n\r\n" + b"2\r\nbb\r\n" * 501, "1002 or more"),
    ],
)
def test_too_large_a_body_is_refused_and_never_reaches_the_application(head, size):
    @application
    async def app(scope, receive, send):
        if scope["method"] == "POST":
            raise AssertionError
        await respond(send, b"ok")

    async def test():
        async with running(BodyLimit(app, LIMIT)) as [url]:
            async with await Client.connect(url) as client:
                await client.send(POST + head)
                message = f"the body has {size} bytes; at most 1000 are read"
                assert _status(await client.response()) == (413, "request_too_large", message)
            await assert_works(url)

    run(test)


def test_a_body_byte_by_byte_is_refused_in_time():
    async def test():
        async with running(BodyLimit(echo, LIMIT, body_timeout=SHORT)) as [url]:
            async with await Client.connect(url) as client:
                await client.send(POST + b"Content-Length: 1000\r\n\r\n")
                await client.trickle(b"a")
                message = "the body did not arrive within 0.3 s"
                assert _status(await client.response()) == (408, "request_timeout", message)
            await assert_works(url)

    run(test)


def test_refusals_are_worded_by_whom_the_service_says():
    def reject(scope, status, message, code):
        async def app(scope, receive, send):
            await respond(send, f"{scope['path']} {status:d} {code}".encode(), 400)

        return app

    async def test():
        async with running(BodyLimit(echo, LIMIT, reject=reject)) as [url], await Client.connect(url) as client:
            await client.send(POST + b"Content-Length: 1001\r\n\r\n")
            assert (await client.response())[::2] == (400, b"/ 413 request_too_large")

    run(test)


class _Seen:
    """An application that stays until it is cancelled, and how it ended."""

    def __init__(self):
        self.events, self.states = [], []

    async def __call__(self, scope, receive, send):
        await application(self.handle)(scope, receive, send)

    async def handle(self, scope, receive, send):
        self.states.append(scope["state"])
        if scope["path"] == "/streaming":
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"a", "more_body": True})
        elif scope["path"] != "/waiting":
            await respond(send, b"ok")
            return
        await receive()
        try:
            self.events.append((await receive())["type"])
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.events.append("cancelled")
            raise

    async def wait_for(self, events):
        while self.events != events:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("path", [b"/waiting", b"/streaming"])
def test_the_application_is_cancelled_when_the_client_leaves(path, caplog):
    async def test():
        app = _Seen()
        async with running(BodyLimit(app, LIMIT)) as [url]:
            async with await Client.connect(url) as client:
                await client.send(POST.replace(b"/ ", path + b" ") + b"Content-Length: 2\r\n\r\nab")
                while not app.states:
                    await asyncio.sleep(0.01)
                await asyncio.sleep(0.05)
                assert app.events == []
            await app.wait_for(["http.disconnect", "cancelled"])
            assert app.states[0]["client_left"]
            await assert_works(url)
            assert "client_left" not in app.states[1]

    run(test)
    assert caplog.records == []


def test_a_client_that_leaves_while_it_sends_wakes_nobody(caplog):
    states = []

    async def outside(scope, receive, send):
        if scope["type"] == "http":
            states.append(scope.setdefault("state", {}))
        await BodyLimit(application(inside), LIMIT)(scope, receive, send)

    async def inside(scope, receive, send):
        if scope["method"] == "POST":
            raise AssertionError
        await respond(send, b"ok")

    async def test():
        async with running(outside) as [url]:
            async with await Client.connect(url) as client:
                await client.send(POST + b"Content-Length: 2\r\n\r\na")
                while not states:
                    await asyncio.sleep(0.01)
            while "client_left" not in states[0]:
                await asyncio.sleep(0.01)
            await assert_works(url)

    run(test)
    assert caplog.records == []


def test_what_an_application_does_after_its_response_is_not_cancelled():
    done = []

    @application
    async def app(scope, receive, send):
        await respond(send, b"ok")
        assert (await receive())["type"] == "http.request"
        assert (await receive())["type"] == "http.disconnect"
        await asyncio.sleep(0.05)
        done.append(True)

    async def test():
        async with running(BodyLimit(app, LIMIT)) as [url]:
            await assert_works(url)
            while not done:
                await asyncio.sleep(0.01)

    run(test)


async def _call(app, body=b""):
    async def receive():
        if messages:
            return messages.pop()
        return await asyncio.sleep(60)

    async def send(message):
        raise AssertionError(message)

    messages = [{"type": "http.request", "body": body}]
    del body
    await app({"type": "http", "method": "POST", "path": "/", "headers": []}, receive, send)


def test_an_application_that_fails_or_is_cancelled_from_outside_shows_it():
    ended = []

    async def failing(scope, receive, send):
        raise OSError("disk")

    async def waiting(scope, receive, send):
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(True)

    async def test():
        with pytest.raises(OSError, match="disk"):
            await _call(BodyLimit(failing, LIMIT))
        task = asyncio.ensure_future(_call(BodyLimit(waiting, LIMIT)))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert ended == [True]

    run(test)


def test_the_body_is_held_by_nobody_but_the_application():
    async def app(scope, receive, send):
        body = (await receive())["body"]
        counts.append(sys.getrefcount(body))

    counts = []
    run(lambda: _call(BodyLimit(app, LIMIT), body=b"a" * LIMIT))
    [count] = counts
    assert count <= 2  # its own name, and the argument


def test_nothing_is_left_of_a_request():
    async def app(scope, receive, send):
        pass

    async def test():
        before = asyncio.all_tasks()
        await _call(BodyLimit(app, LIMIT))
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == before

    run(test)


def test_the_application_may_parse_with_the_limits_of_the_middleware():
    async def app(scope, receive, send):
        parse = scope["state"]["parse_json"]
        assert parse(b"[[1, 2]]") == [[1, 2]]
        for body, match in ((b"[[[]]]", "nested 3 deep; at most 2"), (b"[1,2,3,4,5,6]", "more than 6 brackets")):
            with pytest.raises(InvalidJsonError, match=match):
                parse(body)
        ended.append(True)

    ended = []
    run(lambda: _call(BodyLimit(app, LIMIT, max_depth=2, max_json_items=6)))
    assert ended == [True]


@pytest.mark.parametrize(
    ("body", "match"),
    [
        (b"", "EOF while parsing"),
        (b" ", "EOF while parsing"),
        (b"\xef\xbb\xbf{}", "expected value at line 1 column 1"),
        ('{"a": 1}'.encode("utf-16"), "expected value"),
        ('{"a": 1}'.encode("utf-16-le"), "key must be a string"),
        ('{"a": 1}'.encode("utf-32"), "expected value"),
        (b'"\xff"', "invalid unicode"),
        (b'"\xed\xa0\x80"', "invalid unicode"),
        (b'"\xc0\xaf"', "invalid unicode"),
        (rb'"\ud800"', "not valid JSON"),
        (rb'"\udc00"', "surrogate"),
        (rb'{"\ud800": 1}', "not valid JSON"),
        (rb'"\ud83d\u0041"', "surrogate"),
        (b"NaN", "expected value"),
        (b"[nan]", "not valid JSON"),
        (b"[Infinity]", "expected value"),
        (b"-Infinity", "invalid number"),
        (b"1e400", "number '1e400' is too large"),
        (b'{"a": -1e400}', "number '-1e400' is too large"),
        (b"1" * 400 + b".0", "is too large"),
        (b"1180591620717411303424", "integer '1180591620717411303424' has more than 64 bits"),
        (str(2**64).encode(), "more than 64 bits"),
        (str(-(2**63) - 1).encode(), "more than 64 bits"),
        (b"9" * 200, "integer '9{100}…' has more than 64 bits"),
        (b"9" * 10_000, "number out of range"),
        (b'{"a": 1, "a": 2}', "key 'a' is given twice"),
        (b'[{"x": {"a": 1, "b": 2, "\\u0061": 1}}]', "key 'a' is given twice"),
        (b'{"\\n\\u001b": 1, "\\n\\u001b": 2}', r"key '\\n\\x1b' is given twice"),
        (b"[1,]", "trailing comma"),
        (b"{} {}", "trailing characters"),
        (b"{}\x00", "trailing characters"),
        (b"{'a': 1}", "key must be a string"),
        (b"[01]", "invalid number"),
        (b"[+1]", "expected value"),
        (b"[1.]", "not valid JSON"),
        (b"[.5]", "expected value"),
        (b'"\n"', "control character"),
        (b'"\x00"', "control character"),
        (rb'"\x41"', "invalid escape"),
        (b"// c\n1", "expected value"),
        (b"tru", "not valid JSON"),
    ],
)
def test_what_is_not_strictly_json_is_refused(body, match):
    with pytest.raises(InvalidJsonError, match=match) as caught:
        parse_json(body)
    assert isinstance(caught.value, ClientError)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("body", "value"),
    [
        (b' \t\r\n{"a": [1, -2.5e3, true, false, null, "\\u4e2d\\ud83d\\ude00\\u0000\\"\\\\"]} ', None),
        (str(2**64 - 1).encode(), 2**64 - 1),
        (str(-(2**63)).encode(), -(2**63)),
        (b"1e308", 1e308),
        (b"1e-400", 0.0),
        (b"-0", 0),
        (b'{"": 1, " ": 2}', {"": 1, " ": 2}),
        ('"中文😀"'.encode(), "中文😀"),
    ],
)
def test_what_is_json_is_read(body, value):
    assert parse_json(body) == (json.loads(body) if value is None else value)


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 33 + b"]" * 33,
        b"[" * 100_000,
        b'{"a":' * 33 + b"1" + b"}" * 33,
        b'["\\"]",' + b"[" * 40,
        b'["\\\\",' + b"[" * 40,
        b'["\\\\\\",' + b'"' + b"," + b"[" * 40,
        b'"' + b"[" * 100_000,
        b'\\"' + b"[" * 100_000,
    ],
)
def test_depth_is_bounded_before_anything_is_built(body):
    with pytest.raises(InvalidJsonError, match=r"nested \d+ deep; at most 32"):
        parse_json(body)


def test_depth_counts_no_brackets_in_strings():
    for text in ("[" * 1000, '"[' * 50, "\\" * 7 + "[" * 50, '\\"' + "{" * 50, "]" * 100 + "[" * 100, "\\"):
        value = [text, {text: "[" * 50}]
        assert parse_json(json.dumps(value).encode()) == value
    assert parse_json(b"[" * 32 + b"]" * 32)


def test_items_are_bounded_before_anything_is_built():
    parse_json(b"[" + b"1," * (MAX_JSON_ITEMS - 2) + b"1]")
    too_many = [b"[" + b"1," * (MAX_JSON_ITEMS - 1) + b"1]"]
    too_many += [mark * 6 * MAX_JSON_ITEMS for mark in (b"[", b"{", b",", b'"')]
    for body in too_many:
        with pytest.raises(InvalidJsonError, match=f"more than {MAX_JSON_ITEMS} brackets"):
            parse_json(body)
    text = "a, b, {c}, " * 100_000
    assert parse_json(json.dumps({"text": text}).encode()) == {"text": text}


def test_a_large_body_is_parsed_soon():
    for filling in (b"A", b"\\u0000", b'\\"', b"\\\\", "中".encode(), b",", b"["):
        body = b'{"image": "' + filling * (20 * 2**20 // len(filling)) + b'"}'
        started = time.perf_counter()
        parse_json(body)
        assert time.perf_counter() - started < 3.0  # 0.2 s on a quiet machine


_json = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**63), 2**64 - 1)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=4),
    max_leaves=20,
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(_json, st.booleans())
def test_every_value_comes_back(value, is_ascii):
    assert parse_json(json.dumps(value, ensure_ascii=is_ascii).encode()) == value


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from(list('[]{},:"\\ \n1-.eu0a😀')), max_size=30).map("".join))
def test_what_is_read_is_what_python_reads(text):
    try:
        value = parse_json(text.encode())
    except InvalidJsonError:
        return
    assert value == json.loads(text)
