"""S1 to S5: what makes the service connect, to where, and how long it listens."""

from __future__ import annotations

import gzip
import itertools
import json
import re
import time

import pytest

from tests.server.conftest import IMAGES, data_url
from tests.server.security.conftest import MAX_IMAGE, NAMES, PUBLIC, about, answer_about, chat, refusal_of
from tests.server.security.gallery import Gallery, endless, redirect, response

INWARD = [
    "http://127.0.0.1:{port}/metrics",
    "http://localhost:{port}/",
    "http://localhost./",
    "http://[::1]:{port}/",
    "http://0.0.0.0:{port}/",
    "http://[::]/",
    "http://169.254.169.254/latest/meta-data/",
    "http://10.0.0.1/",
    "http://100.64.0.1/",
    "http://192.168.1.1/",
    "http://[::ffff:127.0.0.1]:{port}/",
    "http://[::ffff:7f00:1]/",
    "http://[64:ff9b::7f00:1]/",
    "http://[fe80::1]/",
    "http://2130706433:{port}/",
    "http://0x7f.1:{port}/",
    "http://0x7f000001/",
    "http://017700000001/",
    "http://127.1:{port}/",
    "https://127.0.0.1:{port}/",
    "http://127.0.0.1.nip.io/",
]
OTHER_ROUTES = [
    ("/generate", "inputs"),
    ("/generate", "prompt"),
    ("/generate_stream", "inputs"),
    ("/", "inputs"),
    ("/infer", "inputs"),
    ("/v1/tokenizer", "inputs"),
    ("/v2/models/nano/generate", "text_input"),
    ("/v2/models/nano/generate_stream", "text_input"),
    ("/tokenize", "messages"),
]
NAMES_INWARD = sorted(set(NAMES) - {"public.example", "rebinding.example"})
TRICKS = [
    "http://public.example@127.0.0.1:{port}/",
    "http://public.example:80@127.0.0.1:{port}/",
    "http://public.example%00.evil.org/",
    "http://public.example\\@127.0.0.1:{port}/",
    "http:\\\\127.0.0.1:{port}\\",
    "http://127.0.0.1:{port}#@public.example/",
    "http://127.0.0.1:{port}?@public.example/",
    "http://public.example.evil.org/",
    "http://evilpublic.example.org/",
    "http://example/",
    "http://public.example:81/",
    "http://public%2eexample%2f@127.0.0.1/",
    "http://１２７.0.0.1:{port}/",
    "http://127。0。0。1:{port}/",
    "http://ⓛocalhost:{port}/",
    "http://loc\u00adalhost:{port}/",
    "http://127.0.0.1:{port}\t/",
    "http://127.0.0.1\n:{port}/",
    "http://public.example/\r\nHost: evil.org",
    " http://127.0.0.1:{port}/",
    "http:///127.0.0.1:{port}/",
    "http:127.0.0.1:{port}/",
    "//127.0.0.1:{port}/",
    "http://[::1",
    "http://",
    "http://public.example:0/",
    "http://public.example:99999999999/",
    "ftp://public.example/word.png",
    "gopher://127.0.0.1:{port}/_GET",
    "unix:/var/run/docker.sock",
    "jar:http://127.0.0.1:{port}/!/",
    "javascript:alert(1)",
    "blob:http://127.0.0.1:{port}/1",
    "http://public.example/" + "a" * 5000,
]


@pytest.fixture(autouse=True)
def _forgotten(network, gallery):
    network.news()
    gallery.requested.clear()
    gallery.ended.clear()


@pytest.fixture(scope="module")
def bystander():
    """A server on this machine that nobody may fetch from."""
    bystander = Gallery()
    bystander.pages["/"] = response((IMAGES / "word.png").read_bytes())
    yield bystander
    bystander.close()


def _dialled(network):
    return [event["dialled"] for event in network.news() if "dialled" in event]


def _reason(refusal):
    """Without what the caller knows anyway."""
    return re.sub(r"^https?://\S+ ", "", refusal)


# --- S1 ----------------------------------------------------------------------------------------------


@pytest.mark.security("S1")
def test_inward_addresses_are_neither_looked_up_nor_dialled(alice, network, bystander, each):
    # The same words as for an address at which nothing listens, and for a name that does not exist.
    usual = _reason(refusal_of(alice, "http://127.0.0.1:1/"))
    assert _reason(refusal_of(alice, "http://no.such.name/")) == usual
    for url in each(INWARD):
        assert _reason(refusal_of(alice, url.format(port=bystander.port))) == usual
        assert network.news() == []
    assert bystander.requested == []


@pytest.mark.security("S1")
def test_no_other_route_dials_them_either(alice, network, bystander, each):
    [message] = about(f"{bystander.url}/")
    for path, field in each(OTHER_ROUTES):
        for given in (message["content"], json.dumps(message["content"])):
            body = {"messages": [message]} if field == "messages" else {field: given}
            answered = alice.post(path, json=body)
            assert answered.status_code in (400, 422)
            assert "[1].image_url: http://127.0.0.1 is not fetched" in answered.text
    assert network.news() == []


@pytest.mark.security("S1")
def test_without_the_option_nothing_is_fetched_at_all(client):
    assert "remote images are off" in refusal_of(client, "https://example.com/word.png")


# --- S2 ----------------------------------------------------------------------------------------------


@pytest.mark.security("S2")
def test_three_redirects_are_followed(alice, gallery):
    gallery.pages |= {f"/{i}": redirect(f"/{i + 1}") for i in range(11)}
    gallery.pages["/11"] = gallery.pages["/word.png"]
    assert answer_about(alice, f"{gallery.url}/8") == "WEMM"
    assert gallery.requested == ["/8", "/9", "/10", "/11"]
    gallery.requested.clear()
    assert "redirects more than 3 times" in refusal_of(alice, f"{gallery.url}/0")
    assert gallery.requested == ["/0", "/1", "/2", "/3"]


@pytest.mark.security("S2")
def test_a_redirect_inward_is_not_followed(alice, gallery, network, bystander, each):
    targets = [
        f"{bystander.url}/",
        f"//127.0.0.1:{bystander.port}/",
        f"http://public.example@127.0.0.1:{bystander.port}/",
        "http://169.254.169.254/latest/meta-data/",
        "http://[::ffff:127.0.0.1]/",
        "http://intranet.example/",
    ]
    statuses = ("301 Moved", "302 Found", "303 See Other", "307 Temporary", "308 Permanent")
    for status, target in each(itertools.product(statuses, targets)):
        gallery.pages["/inward"] = redirect(target, status)
        refusal_of(alice, f"{gallery.url}/inward")
        assert _dialled(network) == [f"127.0.0.1:{gallery.port}"]
    assert bystander.requested == []


@pytest.mark.security("S2")
def test_a_redirect_keeps_to_http(alice, gallery, network, each):
    for target in each(
        ["file:///etc/passwd", "data:image/png;base64,AAAA", "ftp://a/", "unix:/x", "http://[", "x:"]
    ):
        gallery.pages["/elsewhere"] = redirect(target)
        refusal_of(alice, f"{gallery.url}/elsewhere")
        assert _dialled(network) == [f"127.0.0.1:{gallery.port}"]


@pytest.mark.security("S2")
def test_a_redirect_does_not_leave_https(alice, gallery, secure_gallery):
    secure_gallery.pages |= {"/word.png": gallery.pages["/word.png"], "/down": redirect(f"{gallery.url}/word.png")}
    gallery.pages["/up"] = redirect(f"{secure_gallery.url}/word.png")
    gallery.pages["/up-and-down"] = redirect(f"{secure_gallery.url}/down")
    assert answer_about(alice, f"{gallery.url}/up") == "WEMM"
    gallery.requested.clear()
    assert "redirects from https: to http:" in refusal_of(alice, f"{gallery.url}/up-and-down")
    assert gallery.requested == ["/up-and-down"]


# --- S3 ----------------------------------------------------------------------------------------------


@pytest.mark.security("S3")
def test_what_was_checked_is_dialled(alice, network):
    """The name's second answer is inward."""
    assert answer_about(alice, "http://rebinding.example/word.png") == "WEMM"
    assert network.news() == [{"looked_up": "rebinding.example"}, {"dialled": f"{PUBLIC}:80"}]
    refusal_of(alice, "http://rebinding.example/word.png")
    assert network.news() == [{"looked_up": "rebinding.example"}]


@pytest.mark.security("S3")
def test_names_with_an_inward_address_are_not_dialled(alice, network, each):
    usual = _reason(refusal_of(alice, "http://127.0.0.1:1/"))
    for name in each(NAMES_INWARD):
        assert _reason(refusal_of(alice, f"http://{name}/word.png")) == usual
        assert network.news() == [{"looked_up": name}]


@pytest.mark.security("S3")
def test_nor_after_a_redirect(alice, gallery, network, each):
    for name in each(NAMES_INWARD):
        gallery.pages["/name"] = redirect(f"http://{name}/")
        refusal_of(alice, "http://public.example/name")
        assert _dialled(network) == [f"{PUBLIC}:80"]


# --- S4 ----------------------------------------------------------------------------------------------


@pytest.mark.security("S4")
def test_a_url_is_read_in_one_way(alice, network, bystander, each):
    for url in each(TRICKS):
        refusal_of(alice, url.format(port=bystander.port))
        assert network.news() == []
    assert bystander.requested == []


@pytest.mark.security("S4")
@pytest.mark.parametrize(
    "url",
    ["HTTP://PUBLIC.EXAMPLE/word.png", "http://public.example./word.png", "http://public.example:80/word.png"],
)
def test_spellings_of_an_allowed_url_are_the_same(alice, network, url):
    assert answer_about(alice, url) == "WEMM"
    assert _dialled(network) == [f"{PUBLIC}:80"]


# --- S5 ----------------------------------------------------------------------------------------------


OK = b"HTTP/1.1 200 OK\r\n"


RUDE = {
    "no end": endless(OK + b"\r\n", b"a" * 2**16),
    "no last chunk": endless(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"10000\r\n" + b"a" * 2**16 + b"\r\n"),
    "5 GB": endless(OK + b"Content-Length: 5000000000\r\n\r\n", b"a" * 2**16),
    "more than 64 bits": endless(OK + b"Content-Length: 99999999999999999999999999\r\n\r\n", b"a" * 2**16),
    "10 bytes, then more": endless(OK + b"Content-Length: 10\r\n\r\n", b"a" * 2**16),
    "headers": endless(OK, b"X-Header: " + b"a" * 1000 + b"\r\n"),
    "a header": endless(OK + b"X-Header: ", b"a" * 1000),
    "no line": endless(b"", b"a" * 1000),
    "too large": response(b"a" * (MAX_IMAGE + 1)),
    "gzip bomb": response(gzip.compress(bytes(20 * 2**20)), content_encoding="gzip"),
    "short": response(b"a" * 100, content_length=1000),
    "length -1": response(b"a" * 100, content_length=-1),
    "two lengths": response(b"a" * 100, content_length="1, 100"),
    "bad chunk": response(b"zz\r\n", content_length=None, transfer_encoding="chunked"),
    "204": response(b"a", "204 No Content"),
    "401": response(b"a", "401 Unauthorized", www_authenticate="Basic"),
    "999": response(b"a", "999"),
    "no reason": b"HTTP/1.1 200\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01",
    "nothing": b"",
}


@pytest.mark.security("S5")
def test_rude_servers_are_left_at_once(alice, gallery, each):
    for name in each(RUDE):
        gallery.pages["/rude"] = RUDE[name]
        started = time.monotonic()
        refusal_of(alice, f"{gallery.url}/rude")
        assert time.monotonic() - started < 5
    assert gallery.requested == ["/rude"] * len(RUDE)


@pytest.mark.security("S5")
def test_what_a_server_sends_is_an_image_or_nothing(alice, gallery):
    """Whatever it says it is; and nothing of it is shown."""
    gallery.pages["/page"] = response(b"<b>secret</b>", content_type="image/png")
    assert "secret" not in refusal_of(alice, f"{gallery.url}/page")
    gallery.pages["/typed"] = response((IMAGES / "word.png").read_bytes(), content_type="text/html")
    assert answer_about(alice, f"{gallery.url}/typed") == "WEMM"
    gallery.pages["/large"] = response((IMAGES / "word.png").read_bytes().ljust(MAX_IMAGE, b"\0"))
    assert answer_about(alice, f"{gallery.url}/large") == "WEMM"


@pytest.mark.security("S5")
def test_one_slow_server_holds_nobody_up(alice, gallery, neighbour):
    gallery.pages["/slow"] = endless(OK + b"\r\n", b"a", pause=0.1)
    with pytest.raises(Exception, match="timed out"):
        alice.post("/v1/chat/completions", json={"messages": about(f"{gallery.url}/slow")}, timeout=1)
    assert answer_about(alice, data_url("word.png")) == "WEMM"
    assert chat(alice, about(f"{gallery.url}/word.png")).status_code == 200
