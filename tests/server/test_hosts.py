"""What a web page may do through its visitor's browser."""

from __future__ import annotations

import pytest

from wemm.errors import ParameterError

pytest.importorskip("uvicorn")

from starlette.responses import JSONResponse

from tests.server.sockets import Client, answer, run, running
from wemm.server.hosts import HostGuard


def _ask(app, *requests, method="POST"):
    """Headers → (status, headers, body), each on a connection of its own."""
    answers = []

    async def test():
        async with running(app) as [url]:
            for headers in requests:
                async with await Client.connect(url) as client:
                    lines = "".join(f"{name}: {value}\r\n" for name, value in headers)
                    await client.send(f"{method} / HTTP/1.1\r\n{lines}\r\n".encode("latin-1"))
                    answers.append(await client.response())

    run(test)
    return answers


def _statuses(guard, hosts):
    return [status for status, *_ in _ask(guard, *[[("Host", host)] for host in hosts])]


OWN = ["localhost", "LOCALHOST:8000", "localhost.", "127.0.0.1", "127.0.0.1:1", "[::1]:8000", "[0:0:0:0:0:0:0:1]"]
STRANGE = [
    "evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "0.0.0.0", "127.1",
    "127.0.0.2", "169.254.169.254", "[::]", "10.0.0.1", "2130706433",
]  # fmt: skip
BROKEN = [
    "", " ", "a b", "localhost/", "localhost@evil.example", "user:x@localhost", "localhost:8000:1", "localhost:a",
    "::1", "localhost,evil.example", "localhost\\", "[::1", "http://localhost", "localhost%00", "locálhost",
    "localhost:123456",
]  # fmt: skip


@pytest.mark.parametrize("bound", ["127.0.0.1", "localhost", "::1", "[::1]"])
def test_a_loopback_service_answers_to_its_own_names_only(bound):
    guard = HostGuard(answer, bound)
    assert _statuses(guard, OWN) == [200] * len(OWN)
    assert _statuses(guard, STRANGE) == [421] * len(STRANGE)
    assert _statuses(guard, BROKEN) == [400] * len(BROKEN)
    assert _statuses(guard, ["localhost"]) == [200]


def test_a_request_without_a_host_is_refused():
    async def test():
        async with running(HostGuard(answer, "127.0.0.1")) as [url], await Client.connect(url) as client:
            await client.send(b"GET / HTTP/1.0\r\n\r\n")
            assert (await client.response())[0] == 400

    run(test)


def test_the_bound_address_and_more_names_can_be_allowed():
    guard = HostGuard(answer, "127.0.0.5", ["Box.example", "10.0.0.7", "[fe80::0:1]"])
    allowed = ["127.0.0.5:1", "box.example", "BOX.EXAMPLE:9", "10.0.0.7", "[fe80::1]", "localhost"]
    assert _statuses(guard, allowed) == [200] * 6
    assert _statuses(guard, ["a.box.example", "127.0.0.6", "evil.example"]) == [421] * 3
    guard = HostGuard(answer, "127.0.0.1", ["*"])
    assert _statuses(guard, STRANGE) == [200] * len(STRANGE)
    assert _statuses(guard, ["a b"]) == [400]


def test_a_public_service_answers_to_every_name_until_some_are_allowed():
    assert _statuses(HostGuard(answer, "0.0.0.0"), [*OWN, *STRANGE]) == [200] * len(OWN + STRANGE)
    guard = HostGuard(answer, "0.0.0.0", ["box.example"])
    assert _statuses(guard, ["box.example:8000", "localhost", "10.1.2.3:8000", "[fe80::1]"]) == [200] * 4
    assert _statuses(guard, ["evil.example", "127.1"]) == [421] * 2


@pytest.mark.parametrize("host", ["", "a b", "box:8000", "http://box", "box/"])
def test_an_allowed_host_is_a_name(host):
    with pytest.raises(ParameterError, match="an allowed host is a name or an address, without a port"):
        HostGuard(answer, "127.0.0.1", [host])


def _origins(guard, origins, method="POST", host="localhost:8000", **more):
    requests = [[("Host", host), ("Origin", origin), *more.items()] for origin in origins]
    answers = _ask(guard, *requests, method=method)
    return [(status, headers.get("access-control-allow-origin")) for status, headers, _ in answers]


FOREIGN = [
    "http://evil.example", "https://localhost:8000", "http://localhost", "http://localhost:3000", "http://127.0.0.1:8000",
    "http://localhost:8000.evil.example", "null", "", "file://", "http://localhost:8000/", "http://localhost:8000, http://a",
    "chrome-extension://abc",
]  # fmt: skip


@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
def test_pages_of_other_origins_are_refused(method):
    guard = HostGuard(answer, "127.0.0.1")
    assert _origins(guard, FOREIGN, method) == [(403, None)] * len(FOREIGN)
    assert _origins(guard, ["http://localhost:8000"], method) == [(200, None)]


def test_default_ports_are_the_same_origin():
    guard = HostGuard(answer, "127.0.0.1")
    assert _origins(guard, ["http://localhost", "http://localhost:80"], host="localhost") == [(200, None)] * 2
    assert _origins(guard, ["http://localhost"], host="localhost:80") == [(200, None)]
    assert _origins(guard, ["http://[::1]:8000"], host="[::1]:8000") == [(200, None)]


def test_two_origins_are_none():
    guard = HostGuard(answer, "127.0.0.1")
    for origins in (["http://localhost", "http://evil.example"], ["http://evil.example", "http://localhost"]):
        both = [("Host", "localhost"), *[("Origin", origin) for origin in origins]]
        assert [status for status, *_ in _ask(guard, both)] == [403]


@pytest.mark.parametrize(
    ("site", "more", "method", "status"),
    [
        ("cross-site", {}, "POST", 403),
        ("cross-site", {}, "GET", 403),
        ("cross-site", {"Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"}, "GET", 403),
        ("cross-site", {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}, "POST", 403),
        ("cross-site", {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"}, "GET", 403),
        ("cross-site", {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}, "GET", 200),
        ("same-origin", {}, "POST", 200),
        ("none", {}, "GET", 200),
    ],
)
def test_what_the_browser_says_of_a_request_counts(site, more, method, status):
    headers = [("Host", "localhost"), ("Sec-Fetch-Site", site), *more.items()]
    assert [status for status, *_ in _ask(HostGuard(answer, "127.0.0.1"), headers, method=method)] == [status]


def test_allowed_origins_get_cors_headers_and_no_others():
    guard = HostGuard(
        answer, "127.0.0.1", (), ["https://App.example", "http://localhost:3000", "https://b.example:443"]
    )
    allowed = ["https://app.example", "http://localhost:3000", "https://b.example"]
    assert _origins(guard, allowed) == [(200, origin) for origin in allowed]
    assert _origins(guard, allowed[:1], **{"Sec-Fetch-Site": "cross-site"}) == [(200, allowed[0])]
    assert _origins(guard, ["http://app.example", "https://app.example:8443", "null"]) == [(403, None)] * 3
    [(status, headers, _)] = _ask(guard, [("Host", "localhost")])
    assert status == 200
    assert "access-control-allow-origin" not in headers
    assert "access-control-allow-credentials" not in headers


def test_a_preflight_is_answered_before_the_application():
    async def app(scope, receive, send):
        assert scope["type"] == "lifespan"
        await answer(scope, receive, send)

    guard = HostGuard(app, "127.0.0.1", (), ["https://app.example"])
    headers = [
        ("Host", "localhost"), ("Origin", "https://app.example"), ("Access-Control-Request-Method", "POST"),
        ("Access-Control-Request-Headers", "authorization,x-stainless-os"),
    ]  # fmt: skip
    [(status, given, _)] = _ask(guard, headers, method="OPTIONS")
    assert (status, given["access-control-allow-origin"]) == (200, "https://app.example")
    assert "x-stainless-os" in given["access-control-allow-headers"]
    assert "access-control-allow-credentials" not in given


def test_every_origin_can_be_allowed():
    guard = HostGuard(answer, "127.0.0.1", (), ["*"])
    assert _origins(guard, ["https://evil.example", "null"]) == [(200, "*")] * 2


@pytest.mark.parametrize(
    "origin", ["", "app.example", "https://app.example/", "ftp://a", "https://*.example", "null"]
)
def test_an_allowed_origin_is_an_origin(origin):
    with pytest.raises(ParameterError, match="an allowed origin reads like"):
        HostGuard(answer, "127.0.0.1", (), [origin])


def test_refusals_are_worded_by_whom_the_service_says():
    words = []

    def reject(scope, status, message, code):
        words.append((int(status), code))
        return JSONResponse({"dialect": message}, 418)

    guard = HostGuard(answer, "127.0.0.1", reject=reject)
    requests = [[("Host", "a b")], [("Host", "x" * 5000)], [("Host", "localhost"), ("Origin", "null")]]
    answers = _ask(guard, *requests)
    assert [status for status, *_ in answers] == [418] * 3
    assert words == [(400, "invalid_host"), (421, "unknown_host"), (403, "origin_not_allowed")]
    assert len(answers[1][2]) < 300
