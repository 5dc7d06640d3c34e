"""`Fetcher`: images come from the hosts on the list, and nothing else is ever dialled."""

from __future__ import annotations

import asyncio
import functools
import gzip
import ipaddress
import os
import socket
import ssl
import time
from contextlib import asynccontextmanager

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wemm.errors import MediaError, ParameterError
from wemm.server.fetch import Fetcher, resolve_host

PICTURE = b"\x89PNG as good as any"
LIMIT = 1000
PUBLIC = "93.184.215.14"
SECRET = "/s3cret/picture.png?key=s3cret#s3cret"


# --- servers and names -------------------------------------------------------------------------------


def response(body=PICTURE, status="200 OK", **headers):
    """The bytes of an HTTP answer; `content_type=…` becomes Content-Type."""
    headers = {"Content-Length": len(body), **{name.replace("_", "-"): value for name, value in headers.items()}}
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items() if value is not None)
    return f"HTTP/1.1 {status}\r\n{lines}\r\n".encode() + body


def redirect(location, status="302 Found"):
    return response(b"", status, location=location)


class Site:
    """A server on loopback. `answer`: bytes, a list of them (one per connection), or a coroutine function."""

    def __init__(self, answer):
        self.answer = answer
        self.requests = []
        self._tasks = set()

    async def __call__(self, reader, writer):
        self._tasks.add(asyncio.current_task())
        try:
            self.requests.append(await reader.readuntil(b"\r\n\r\n"))
            if callable(self.answer):
                await self.answer(writer)
            else:
                answer = self.answer.pop(0) if isinstance(self.answer, list) else self.answer
                writer.write(answer)
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    def stop(self):
        for task in self._tasks:
            task.cancel()


@asynccontextmanager
async def serving(answer=None, host="127.0.0.1", tls=None):
    site = Site(response() if answer is None else answer)
    server = await asyncio.start_server(site, host, 0, ssl=tls)
    site.port = server.sockets[0].getsockname()[1]
    try:
        yield site
    finally:
        site.stop()
        server.close()


def names(**table):
    """A resolver: name → addresses, or a list of such answers, one after the other; `_` stands for a dot."""
    table = {name.replace("_", "."): answer for name, answer in table.items()}

    async def resolve(host, port):
        resolve.asked.append(host)
        answer = table[host]
        if isinstance(answer, OSError):
            raise answer
        if answer and isinstance(answer[0], list):
            answer = answer.pop(0) if len(answer) > 1 else answer[0]
        return answer

    resolve.asked = []
    return resolve


@pytest.fixture(autouse=True)
def dialled(monkeypatch):
    """Every address that any socket of this process is asked to connect to. Only loopback really is."""
    addresses = []
    connect = socket.socket.connect

    def spy(self, address):
        addresses.append(address[0])
        if not ipaddress.ip_address(address[0]).is_loopback:
            raise ConnectionRefusedError
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", spy)
    return addresses


@pytest.fixture(autouse=True)
def _contexts_are_made_once(monkeypatch):
    """Reading all authorities takes longer than most tests."""
    monkeypatch.setattr(httpx, "create_ssl_context", lambda: ssl_context(os.environ.get("SSL_CERT_FILE")))


@functools.cache
def ssl_context(authorities, create=httpx.create_ssl_context):
    return create()


@asynccontextmanager
async def fetching(*allowed, **options):
    fetcher = Fetcher(allowed, LIMIT, **options)
    try:
        yield fetcher
    finally:
        await fetcher.close()


async def refusal(fetcher, url):
    with pytest.raises(MediaError) as caught:
        await fetcher.fetch(url)
    message = str(caught.value)
    assert message
    assert message.isprintable()
    assert len(message) < 400
    return message


def run(scenario):
    return asyncio.run(asyncio.wait_for(scenario, 30))


NOT_FETCHED = "is not fetched: only hosts given with --allowed-media-host"


# --- what works --------------------------------------------------------------------------------------


def test_an_image_of_an_allowed_host(dialled):
    async def scenario():
        resolve = names(images_test=["127.0.0.1"])
        async with serving() as site, fetching(f"private:images.test:{site.port}", resolve=resolve) as fetcher:
            for url in ("http://images.test:{}/a.png?b=c#d", "HTTP://IMAGES.Test.:{}/a.png?b=c"):
                assert await fetcher.fetch(url.format(site.port)) == PICTURE
            assert resolve.asked == ["images.test"] * 2
            return site

    site = run(scenario())
    assert dialled == ["127.0.0.1"] * 2
    for request in site.requests:
        head, *lines = request.decode().strip().split("\r\n")
        assert head == "GET /a.png?b=c HTTP/1.1"
        headers = dict(line.lower().split(": ", 1) for line in lines)
        assert headers.pop("host") == f"images.test:{site.port}"
        assert headers.pop("accept-encoding") == "identity"
        assert headers.pop("connection") == "close"
        assert set(headers) == {"accept", "user-agent"}


def test_nothing_is_fetched_by_default(dialled):
    async def scenario():
        async with serving() as site, fetching() as fetcher:
            message = await refusal(fetcher, f"http://127.0.0.1:{site.port}/")
            assert "--allowed-media-host" in message
            assert "data: URL" in message

    run(scenario())
    assert dialled == []


@pytest.mark.parametrize(
    ("entry", "url", "allowed"),
    [
        ("example.com", "http://example.com/", True),
        ("example.com", "https://example.com/", True),
        ("example.com", "https://EXAMPLE.com.:443/", True),
        ("Example.COM.", "http://example.com/", True),
        ("example.com", "http://example.com:8080/", False),
        ("example.com", "http://example.com:443/", False),
        ("example.com", "http://www.example.com/", False),
        ("example.com", "http://example.com.evil.test/", False),
        ("example.com", "http://notexample.com/", False),
        ("example.com:8443", "https://example.com:8443/", True),
        ("example.com:8443", "https://example.com/", False),
        ("example.com:80", "http://example.com/", True),
        ("example.com:80", "https://example.com/", False),
        ("*.example.com", "http://a.b.example.com/", True),
        ("*.example.com", "http://example.com/", False),
        ("*.example.com", "http://notexample.com/", False),
        ("*.example.com:81", "http://a.example.com:81/", True),
        ("bücher.example", "http://bücher.example/", True),
        ("xn--bcher-kva.example", "http://BÜCHER.example/", True),
        ("bücher.example", "http://xn--bcher-kva.example/", True),
        ("bücher.example", "http://bucher.example/", False),
        (PUBLIC, f"http://{PUBLIC}/", True),
        ("[2606:4700:0:0::1111]", "http://[2606:4700::1111]/", True),
    ],
)
def test_the_list_of_hosts(entry, url, allowed, dialled):
    async def resolve(host, port):
        assert host.isascii()
        return [PUBLIC]

    async def scenario():
        async with fetching(entry, resolve=resolve) as fetcher:
            assert ("cannot be reached" if allowed else NOT_FETCHED) in await refusal(fetcher, url)

    run(scenario())
    assert len(dialled) == allowed


@pytest.mark.parametrize(
    "entry",
    [
        "", "*", "*.", "*.*.a", "*.1.2.3", "http://example.com", "example.com/", "user@example.com",
        "example.com:0", "example.com:99999", "example.com:x", "a b", "a..b", "a\\b", "example.com\n", "private:",
        "2130706433", "0x7f.1", "127.1", "[::1", "[::1%eth0]", "x" * 1000,
    ],
)  # fmt: skip
def test_an_entry_that_is_no_host_is_refused_at_the_start(entry):
    with pytest.raises(ParameterError, match=r"example\.com:8443"):
        Fetcher([entry], LIMIT)


def test_private_holds_for_its_own_entry_only(dialled):
    async def scenario():
        async with serving() as site:
            entries = [f"private:images.test:{site.port}", f"other.test:{site.port}"]
            resolve = names(images_test=["127.0.0.1"], other_test=["127.0.0.1"])
            async with fetching(*entries, resolve=resolve) as fetcher:
                assert NOT_FETCHED in await refusal(fetcher, f"http://other.test:{site.port}/")
                assert dialled == []
                assert await fetcher.fetch(f"http://images.test:{site.port}/") == PICTURE

    run(scenario())


def test_private_addresses_count_like_names():
    async def scenario():
        async with serving() as site, fetching(f"private:127.0.0.1:{site.port}") as fetcher:
            assert await fetcher.fetch(f"http://127.0.0.1:{site.port}/") == PICTURE
            assert f"Host: 127.0.0.1:{site.port}\r\n".encode() in site.requests[0]

    run(scenario())


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6")
def test_an_ipv6_address():
    async def scenario():
        try:
            context = serving(host="::1")
            site = await context.__aenter__()
        except OSError:
            pytest.skip("no IPv6 loopback here")
        async with fetching(f"private:[::1]:{site.port}") as fetcher:
            assert await fetcher.fetch(f"http://[0:0:0::1]:{site.port}/") == PICTURE
            assert f"Host: [::1]:{site.port}\r\n".encode() in site.requests[0]
        await context.__aexit__(None, None, None)

    run(scenario())


def test_the_next_address_is_tried_where_one_does_not_answer(dialled):
    async def scenario():
        resolve = names(images_test=["10.1.1.1", "10.1.1.1", "127.0.0.1"])
        async with serving() as site, fetching(f"private:images.test:{site.port}", resolve=resolve) as fetcher:
            assert await fetcher.fetch(f"http://images.test:{site.port}/") == PICTURE

    run(scenario())
    assert dialled == ["10.1.1.1", "127.0.0.1"]


def test_the_resolver_of_the_system():
    assert "127.0.0.1" in run(resolve_host("127.0.0.1", 80))
    with pytest.raises(OSError):
        run(resolve_host("no-such-name.invalid", 80))


# --- addresses that are refused ----------------------------------------------------------------------

TRAPS = [
    "http://127.0.0.1:{port}/metrics",
    "http://localhost:{port}",
    "http://[::1]:{port}/",
    "http://0.0.0.0:{port}/",
    "http://169.254.169.254/latest/meta-data/",
    "http://10.0.0.1/",
    "http://100.64.0.1/",
    "http://[::ffff:127.0.0.1]:{port}/",
    "http://2130706433:{port}/",
    "http://0x7f.1:{port}/",
    "http://017700000001:{port}/",
    "http://127.1:{port}/",
    "http://127。0。0。1:{port}/",
    "http://[::]:{port}/",
    "http://127.0.0.1.:{port}/",
    "http://allowed.test/",
]
NOT_PUBLIC = [
    "127.0.0.1", "127.8.8.8", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
    "192.0.2.1", "198.18.0.1", "203.0.113.1", "224.0.0.1", "240.0.0.1", "255.255.255.255",
    "::", "::1", "::7f00:1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a00:1",
    "64:ff9b:1::7f00:1", "2002:7f00:1::", "2002:a00:1::1", "2001:0:1::1", "2001:db8::1", "fc00::1", "fd12::1",
    "fe80::1", "fe80::1%lo", "fec0::1", "ff02::1", "100::1", "no address", "",
]  # fmt: skip


@pytest.mark.parametrize("url", TRAPS)
def test_an_address_beside_the_list_is_refused_before_it_is_dialled(url, dialled):
    async def scenario():
        resolve = names(images_test=["127.0.0.1"])
        async with serving() as site, fetching(f"private:images.test:{site.port}", resolve=resolve) as fetcher:
            assert NOT_FETCHED in await refusal(fetcher, url.format(port=site.port))
            assert (dialled, resolve.asked, site.requests) == ([], [], [])
            assert await fetcher.fetch(f"http://images.test:{site.port}/") == PICTURE

    run(scenario())


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "[::ffff:127.0.0.1]", "10.0.0.1", "localhost"])
def test_an_address_on_the_list_must_be_public(host, dialled):
    async def scenario():
        async with fetching(host, resolve=names(localhost=["127.0.0.1"])) as fetcher:
            assert NOT_FETCHED in await refusal(fetcher, f"http://{host}/")

    run(scenario())
    assert dialled == []


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("address", NOT_PUBLIC)
def test_an_allowed_host_must_be_public_at_every_address(address, mixed, dialled):
    async def scenario():
        resolve = names(allowed_test=[PUBLIC, address] if mixed else [address])
        async with fetching("allowed.test", resolve=resolve) as fetcher:
            assert NOT_FETCHED in await refusal(fetcher, "http://allowed.test/")

    run(scenario())
    assert dialled == []


@pytest.mark.parametrize(
    "address", [PUBLIC, "2606:4700::1111", "64:ff9b::5db8:d70e", "::ffff:93.184.215.14", "2002:5db8:d70e::1"]
)
def test_a_public_address_is_dialled(address, dialled):
    async def scenario():
        async with fetching("allowed.test", resolve=names(allowed_test=[address])) as fetcher:
            assert "cannot be reached" in await refusal(fetcher, "http://allowed.test/")

    run(scenario())
    assert [ipaddress.ip_address(dialled[0])] == [ipaddress.ip_address(address)]


@pytest.mark.parametrize("address", ["224.0.0.1", "0.0.0.0", "ff02::1", "::"])
def test_even_private_is_one_host(address, dialled):
    async def scenario():
        async with fetching("private:allowed.test", resolve=names(allowed_test=[address])) as fetcher:
            assert NOT_FETCHED in await refusal(fetcher, "http://allowed.test/")

    run(scenario())
    assert dialled == []


def test_the_message_does_not_tell_what_is_there():
    """Open port, closed port, no such name, no answer, not on the list: the same words."""

    async def scenario():
        async with serving() as site:
            resolve = names(
                a_test=["127.0.0.1"], b_test=OSError("no such name"), c_test=[], d_test=["10.0.0.1"], e_test=["x"]
            )
            hosts = [f"{name}.test:{site.port}" for name in "abcde"]
            async with fetching(*hosts, resolve=resolve) as fetcher:
                urls = [f"http://{host}/" for host in (*hosts, "f.test", "127.0.0.1", "127.0.0.1:1")]
                found = [await refusal(fetcher, url) for url in urls]
                return {message.split(" ", 1)[1] for message in found}

    assert len(run(scenario())) == 1


# --- names that change -------------------------------------------------------------------------------


def test_a_name_is_resolved_once_and_what_was_checked_is_dialled(dialled):
    """Public at the first question, here at the second: there is no second one."""

    async def scenario():
        async with serving() as site:
            resolve = names(rebind_test=[[PUBLIC], ["127.0.0.1"]])
            async with fetching(f"rebind.test:{site.port}", resolve=resolve) as fetcher:
                assert "cannot be reached" in await refusal(fetcher, f"http://rebind.test:{site.port}/")
                assert (dialled, resolve.asked) == ([PUBLIC], ["rebind.test"])
                assert NOT_FETCHED in await refusal(fetcher, f"http://rebind.test:{site.port}/")
            assert (dialled, site.requests) == ([PUBLIC], [])

    run(scenario())


def test_a_name_is_resolved_and_checked_again_at_every_hop(dialled):
    async def scenario():
        async with serving([redirect("/next"), response()]) as site:
            resolve = names(rebind_test=[["127.0.0.1"], ["224.0.0.1"], ["127.0.0.1"]])
            async with fetching(f"private:rebind.test:{site.port}", resolve=resolve) as fetcher:
                assert NOT_FETCHED in await refusal(fetcher, f"http://rebind.test:{site.port}/")
                assert (dialled, len(site.requests)) == (["127.0.0.1"], 1)
                assert await fetcher.fetch(f"http://rebind.test:{site.port}/") == PICTURE

    run(scenario())


# --- redirects ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["301 M", "302 F", "303 S", "307 T", "308 P"])
@pytest.mark.parametrize(
    "location", ["/b.png", "b.png", "?b", "http://images.test:{port}/b.png", "//images.test:{port}"]
)
def test_a_redirect_within_the_list_is_followed(location, status):
    async def scenario():
        async with serving() as site:
            site.answer = [redirect(location.format(port=site.port), status), response()]
            resolve = names(images_test=["127.0.0.1"])
            async with fetching(f"private:images.test:{site.port}", resolve=resolve) as fetcher:
                assert await fetcher.fetch(f"http://images.test:{site.port}/a") == PICTURE
            assert len(site.requests) == 2

    run(scenario())


@pytest.mark.parametrize("status", ["302 Found", "307 Temporary Redirect"])
@pytest.mark.parametrize(
    ("location", "reason"),
    [
        *((url, NOT_FETCHED) for url in TRAPS),
        ("file:///etc/passwd", "must begin with http:"),
        ("ftp://images.test/", "must begin with http:"),
        ("data:image/png;base64,AAAA", "must begin with http:"),
        ("http://user@images.test:{port}/", "user name"),
        ("http://images.test\\@127.0.0.1/", "backslash"),
        ("/a%00b", "backslash or a control character"),
        ("/" + "a" * 5000, "5001 characters"),
        ("http://[::1", "not valid"),
        ("http://images.test:port/", "not valid"),
    ],
)
def test_a_redirect_elsewhere_is_refused_before_it_is_dialled(location, reason, status, dialled):
    async def scenario():
        async with serving() as site:
            site.answer = [redirect(location.format(port=site.port), status), response()]
            resolve = names(images_test=["127.0.0.1"])
            async with fetching(f"private:images.test:{site.port}", resolve=resolve) as fetcher:
                url = f"http://images.test:{site.port}/"
                assert reason in await refusal(fetcher, url)
                assert dialled == ["127.0.0.1"]
                assert await fetcher.fetch(url) == PICTURE

    run(scenario())


@pytest.mark.parametrize(("hops", "followed"), [(3, True), (4, False), (11, False)])
def test_the_number_of_redirects_is_bounded(hops, followed, dialled):
    async def scenario():
        answers = [redirect(f"/{hop}") for hop in range(hops)]
        async with serving([*answers[:4], response(), response()]) as site:
            resolve = names(images_test=["127.0.0.1"])
            async with fetching(f"private:images.test:{site.port}", resolve=resolve) as fetcher:
                url = f"http://images.test:{site.port}/"
                if followed:
                    assert await fetcher.fetch(url) == PICTURE
                else:
                    assert "redirects more than 3 times" in await refusal(fetcher, url)
                assert len(site.requests) == 4
                assert await fetcher.fetch(url) == PICTURE

    run(scenario())


def test_a_redirect_carries_no_cookie_and_no_referer():
    async def scenario():
        first = redirect("/b").replace(b"\r\n\r\n", b"\r\nSet-Cookie: a=b; Path=/\r\n\r\n")
        async with serving([first, response()]) as site:
            resolve = names(images_test=["127.0.0.1"])
            async with fetching(f"private:images.test:{site.port}", resolve=resolve) as fetcher:
                assert await fetcher.fetch(f"http://images.test:{site.port}{SECRET}") == PICTURE
            return site.requests[1].lower()

    request = run(scenario())
    assert b"cookie" not in request
    assert b"s3cret" not in request


# --- URLs that parsers read differently --------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://allowed.test@127.0.0.1:{port}/", "user name"),
        ("http://a:b@allowed.test:{port}/", "user name"),
        ("http://allowed.test%00.evil:{port}/", "control character"),
        ("http://allowed.test\0.evil:{port}/", "control character"),
        ("http://allowed.test\\@127.0.0.1:{port}/", "backslash"),
        ("http:\\\\allowed.test:{port}/", "backslash"),
        ("http://allowed.test\t:{port}/", "control character"),
        ("http://allowed.test:{port}/\r\nHost: evil", "control character"),
        ("http://allowed.test:{port}/\u2028", "control character"),
        ("http://allowed.test:{port}/\ud800", "control character"),
        ("http://127.0.0.1:{port}#@allowed.test/", NOT_FETCHED),
        ("http://127.0.0.1:{port}?@allowed.test/", NOT_FETCHED),
        ("http://127.0.0.1:{port}/@allowed.test/", NOT_FETCHED),
        ("http://ａllowed.test:{port}/", "not valid"),
        ("http://allоwed.test:{port}/", NOT_FETCHED),  # a Cyrillic letter
        ("http://allowed.test%2f:{port}/", NOT_FETCHED),
        ("http://allowed test:{port}/", NOT_FETCHED),
        ("http://allowed..test:{port}/", NOT_FETCHED),
        ("http://[fe80::1%25lo]:{port}/", NOT_FETCHED),
        ("http://allowed.test:{port}/" + "a" * 5000, "at most 4096"),
        ("http://allowed.test:-1/", "not valid"),
        ("http://allowed.test:65536/", "not valid"),
        ("http://allowed.test:{port}x/", "not valid"),
        ("http://0127.0.0.1:{port}/", "not valid"),
        ("http://[::1:{port}/", "not valid"),
        ("http:///a", "not valid"),
        ("http:allowed.test", "not valid"),
        ("http://", "not valid"),
        ("//allowed.test:{port}/", "must begin with http:"),
        ("allowed.test", "must begin with http:"),
        ("", "must begin with http:"),
        ("ftp://allowed.test:{port}/", "must begin with http:"),
        ("gopher://allowed.test:{port}/", "must begin with http:"),
        ("unix:/run/socket", "must begin with http:"),
        ("file:///etc/passwd", "must begin with http:"),
        ("x" * 200 + "://allowed.test/", "must begin with http:"),
    ],
)
def test_a_tricky_url_is_refused_before_anything_is_dialled(url, reason, dialled):
    async def scenario():
        async with serving() as site:
            resolve = names(allowed_test=["127.0.0.1"])
            async with fetching(f"private:allowed.test:{site.port}", resolve=resolve) as fetcher:
                assert reason in await refusal(fetcher, url.format(port=site.port))
                assert (dialled, resolve.asked) == ([], [])
                assert await fetcher.fetch(f"HTTP://allowed.test:{site.port}/") == PICTURE

    run(scenario())


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.one_of(
        st.text(max_size=40).map("http://".__add__),
        st.text(":/?#[]@!$&'()*+,;=%\\.0123456789abcxttph-_\0\t é。", max_size=40).map("http://a.test".__add__),
        st.text(max_size=40),
    )
)
def test_any_other_text_is_refused_in_peace(url):
    async def scenario():
        async with fetching("allowed.test", resolve=names()) as fetcher:
            await refusal(fetcher, url)

    run(scenario())


# --- bodies ------------------------------------------------------------------------------------------


async def endless_body(writer):
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        writer.write(b"x" * 10_000)
        await writer.drain()


async def endless_chunks(writer):
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        writer.write(b"1\r\nx\r\n" * 1000)
        await writer.drain()


async def much_more_than_said(writer):
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n")
    while True:
        writer.write(b"x" * 10_000)
        await writer.drain()


async def slow_body(writer):
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n")
    while True:
        writer.write(b"x")
        await asyncio.sleep(0.02)


async def slow_headers(writer):
    writer.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        writer.write(b"X-More: and more\r\n")
        await writer.drain()
        await asyncio.sleep(0.02)


async def endless_headers(writer):
    writer.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        writer.write(b"X-More: and more\r\n" * 1000)
        await writer.drain()


async def endless_preliminaries(writer):
    while True:
        writer.write(b"HTTP/1.1 103 Early Hints\r\n\r\n" * 100)
        await writer.drain()
        await asyncio.sleep(0.01)


async def silence(writer):
    await asyncio.sleep(60)


BODIES = {
    "endless": (endless_body, "more than 1000 bytes"),
    "endless, in chunks": (endless_chunks, "more than 1000 bytes"),
    "one byte too long": (response(b"x" * 1001), "more than 1000 bytes"),
    "one byte too long, no length": (response(b"x" * 1001, Content_Length=None), "more than 1000 bytes"),
    "said to be huge": (response(b"", Content_Length=10**15), "more than 1000 bytes"),
    "said to be huger": (response(b"", Content_Length="9" * 15 + "0"), "more than 1000 bytes"),
    "shorter than said": (response(b"abc", Content_Length=500), "broke off"),
    "of two lengths": (response(b"abc", Content_Length="3\r\nContent-Length: 5"), "broke off"),
    "gzip": (response(gzip.compress(bytes(10**6)), Content_Encoding="gzip"), "compressed"),
    "deflate": (response(b"abc", Content_Encoding="DEFLATE"), "compressed"),
    "encoded twice": (response(b"abc", Content_Encoding="identity, gzip"), "compressed"),
    "gzip in transfer": (response(b"abc", Transfer_Encoding="gzip, chunked", Content_Length=None), "broke off"),
    "slow": (slow_body, "took longer than 0.3 s"),
    "slow headers": (slow_headers, "took longer than 0.3 s"),
    "endless headers": (endless_headers, "broke off"),
    "endless preliminaries": (endless_preliminaries, "took longer than 0.3 s"),
    "silence": (silence, "took longer than 0.3 s"),
    "not found": (response(status="404 Not Found"), "status 404"),
    "part": (response(status="206 Partial Content"), "status 206"),
    "no content": (response(b"", status="204 No Content"), "status 204"),
    "not modified": (response(b"", status="304 Not Modified"), "status 304"),
    "another protocol": (response(b"", status="101 Switching Protocols", Upgrade="x"), "broke off"),
    "redirect to nowhere": (response(b"", status="302 Found"), "redirect"),
    "not HTTP": (b"SSH-2.0-OpenSSH\r\n", "broke off"),
    "nothing": (b"", "broke off"),
}


@pytest.mark.parametrize("name", BODIES)
def test_a_bad_answer_is_refused_and_the_next_fetch_works(name):
    answer, reason = BODIES[name]

    async def scenario():
        async with serving(answer) as site:
            resolve = names(images_test=["127.0.0.1"])
            allowed = f"private:images.test:{site.port}"
            seconds = 0.3 if "took longer" in reason else 10.0
            async with fetching(allowed, resolve=resolve, total_timeout=seconds) as fetcher:
                started = time.monotonic()
                message = await refusal(fetcher, f"http://images.test:{site.port}{SECRET}")
                assert reason in message
                assert "http://images.test" in message
                assert "s3cret" not in message
                assert time.monotonic() - started < 5
            async with fetching(allowed, resolve=resolve) as fetcher:
                site.answer = response()
                assert await fetcher.fetch(f"http://images.test:{site.port}/") == PICTURE

    run(scenario())


def test_of_a_body_longer_than_said_only_what_was_said_is_read():
    async def scenario():
        async with serving(much_more_than_said) as site:
            resolve = names(images_test=["127.0.0.1"])
            async with fetching(f"private:images.test:{site.port}", resolve=resolve) as fetcher:
                assert await fetcher.fetch(f"http://images.test:{site.port}/") == b"x" * 10
                site.answer = response()
                assert await fetcher.fetch(f"http://images.test:{site.port}/") == PICTURE

    run(scenario())


@pytest.mark.parametrize(
    "answer",
    [
        response(b"x" * LIMIT),
        response(b"x" * LIMIT, Content_Length=None),
        response(b"3e8\r\n" + b"x" * LIMIT + b"\r\n0\r\n\r\n", Transfer_Encoding="chunked", Content_Length=None),
        response(b"x" * LIMIT, Content_Encoding="identity"),
    ],
)
def test_a_body_of_just_the_limit_is_read(answer):
    async def scenario():
        async with serving(answer) as site, fetching(f"private:127.0.0.1:{site.port}") as fetcher:
            assert await fetcher.fetch(f"http://127.0.0.1:{site.port}/") == b"x" * LIMIT

    run(scenario())


def test_the_deadline_holds_for_names_too():
    async def resolve(host, port):
        await asyncio.sleep(60)

    async def scenario():
        async with fetching("images.test", resolve=resolve, total_timeout=0.05) as fetcher:
            assert await refusal(fetcher, "http://images.test/") == "http://images.test took longer than 0.05 s"

    run(scenario())


def test_the_deadline_holds_for_all_hops_together():
    async def slow_redirect(writer):
        await asyncio.sleep(0.15)
        writer.write(redirect("/"))

    async def scenario():
        async with serving(slow_redirect) as site:
            async with fetching(f"private:127.0.0.1:{site.port}", total_timeout=0.4, max_redirects=100) as fetcher:
                assert "took longer than 0.4 s" in await refusal(fetcher, f"http://127.0.0.1:{site.port}/")
            assert len(site.requests) <= 3

    run(scenario())


def test_a_fetch_that_is_cancelled_closes_its_connection():
    async def scenario():
        closed = asyncio.Event()

        async def until_closed(writer):
            try:
                await slow_headers(writer)
            except OSError:
                closed.set()

        async with serving(until_closed) as site, fetching(f"private:127.0.0.1:{site.port}") as fetcher:
            task = asyncio.create_task(fetcher.fetch(f"http://127.0.0.1:{site.port}/"))
            while not site.requests:
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.wait_for(closed.wait(), 10)

    run(scenario())


def test_close_ends_what_is_under_way():
    async def scenario():
        async with serving(silence) as site:
            fetcher = Fetcher([f"private:127.0.0.1:{site.port}"], LIMIT)
            task = asyncio.create_task(refusal(fetcher, f"http://127.0.0.1:{site.port}/"))
            while not site.requests:
                await asyncio.sleep(0.01)
            await fetcher.close()
            assert "broke off" in await task

    run(scenario())


def test_many_fetches_at_once():
    async def scenario():
        async with serving() as site, fetching(f"private:127.0.0.1:{site.port}") as fetcher:
            urls = [f"http://127.0.0.1:{site.port}/{i}" for i in range(50)]
            assert await asyncio.gather(*map(fetcher.fetch, urls)) == [PICTURE] * 50
            assert len(site.requests) == 50

    run(scenario())


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_a_proxy_of_the_environment_is_not_used(variable, monkeypatch, dialled):
    monkeypatch.setenv(variable, "http://127.0.0.2:1")

    async def scenario():
        async with serving() as site, fetching(f"private:127.0.0.1:{site.port}") as fetcher:
            assert await fetcher.fetch(f"http://127.0.0.1:{site.port}/") == PICTURE

    run(scenario())
    assert dialled == ["127.0.0.1"]


# --- secrets -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "http://s3cret:s3cret@images.test/", "http://images.test" + SECRET, "http://[::1" + SECRET,
        "http://images.test:s3cret/", "ftp://images.test" + SECRET, "http://images.test/\n" + SECRET,
        "http://images.test/" + "s3cret" * 1000, "http://127.0.0.1" + SECRET,
    ],
)  # fmt: skip
def test_messages_of_refused_urls_show_scheme_and_host_only(url):
    async def scenario():
        async with fetching("images.test:81") as fetcher:
            assert "s3cret" not in await refusal(fetcher, url)

    run(scenario())


# --- TLS ---------------------------------------------------------------------------------------------


@pytest.fixture
def tls(monkeypatch, tmp_path):
    """The server's side of TLS with a certificate for images.test, of an authority that is trusted here."""
    trustme = pytest.importorskip("trustme")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(tmp_path / "authority.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("images.test").configure_cert(context)
    return context


def test_the_certificate_must_be_for_the_name(tls, dialled):
    """Not for the address, and not for another name at the same address: connections are not shared."""

    async def scenario():
        asked = []
        tls.sni_callback = lambda connection, name, context: asked.append(name)
        async with serving(tls=tls) as site:
            resolve = names(images_test=["127.0.0.1"], other_test=["127.0.0.1"])
            allowed = [f"private:{host}:{site.port}" for host in ("images.test", "other.test", "127.0.0.1")]
            async with fetching(*allowed, resolve=resolve) as fetcher:
                for _ in range(2):
                    assert await fetcher.fetch(f"https://images.test.:{site.port}/") == PICTURE
                    message = await refusal(fetcher, f"https://other.test:{site.port}/")
                    assert "certificate is not valid for 'other.test'" in message
                    assert "not valid for '127.0.0.1'" in await refusal(fetcher, f"https://127.0.0.1:{site.port}/")
            assert len(site.requests) == 2
        return asked

    assert run(scenario()) == ["images.test", "other.test", None] * 2
    assert dialled == ["127.0.0.1"] * 6


def test_an_unknown_authority_is_refused(tls, monkeypatch):
    monkeypatch.delenv("SSL_CERT_FILE")

    async def scenario():
        resolve = names(images_test=["127.0.0.1"])
        async with (
            serving(tls=tls) as site,
            fetching(f"private:images.test:{site.port}", resolve=resolve) as fetcher,
        ):
            assert "unable to get local issuer" in await refusal(fetcher, f"https://images.test:{site.port}/")
            assert site.requests == []

    run(scenario())


def test_https_does_not_fall_to_http(tls, dialled):
    async def scenario():
        async with serving() as plain, serving(tls=tls) as secure:
            resolve = names(images_test=["127.0.0.1"])
            allowed = [f"private:images.test:{site.port}" for site in (plain, secure)]
            http, https = f"http://images.test:{plain.port}", f"https://images.test:{secure.port}"
            async with fetching(*allowed, resolve=resolve) as fetcher:
                secure.answer = redirect(f"{http}/")
                assert "redirects from https: to http:" in await refusal(fetcher, f"{https}/")
                assert plain.requests == []
                plain.answer = redirect(f"{https}/")
                assert "redirects from https: to http:" in await refusal(fetcher, f"{http}/")
                assert len(plain.requests) == 1
                secure.answer = response()
                assert await fetcher.fetch(f"{http}/") == PICTURE

    run(scenario())


def test_http_to_a_port_of_https_and_the_other_way_round(tls):
    async def scenario():
        resolve = names(images_test=["127.0.0.1"])
        async with serving() as plain, serving(tls=tls) as secure:
            allowed = [f"private:images.test:{site.port}" for site in (plain, secure)]
            async with fetching(*allowed, resolve=resolve) as fetcher:
                assert "broke off" in await refusal(fetcher, f"http://images.test:{secure.port}/")
            async with fetching(*allowed, resolve=resolve, connect_timeout=0.2) as fetcher:
                assert "cannot be reached" in await refusal(fetcher, f"https://images.test:{plain.port}/")

    run(scenario())
