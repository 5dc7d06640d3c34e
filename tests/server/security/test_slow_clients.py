"""S18 and S19: clients that are slow, many or gone; and, for they take as long, the slow servers of S5."""

from __future__ import annotations

import json
import resource
import socket
import struct
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack

import httpx
import psutil
import pytest

from tests.processing.test_decode_pool import CPU_BOMB
from tests.server.conftest import conversation, data_url
from tests.server.security.conftest import (
    ALICE,
    BOB,
    DECODE_SECONDS,
    MAX_BODY,
    Wire,
    about,
    answer_about,
    chat,
    figure,
    refusal_of,
    wait_until,
)
from tests.server.security.gallery import endless
from tests.server.security.test_hostile_images import url_of

ENDLESS = {"max_tokens": 900, "ignore_eos": True, "repetition_guard": False}
FETCH_SECONDS = BODY_SECONDS = WRITE_SECONDS = 60
HEADER_SECONDS = 10


def head(path="/v1/chat/completions", length=None, method="POST"):
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", f"X-API-Key: {ALICE}"]
    lines += [f"Content-Length: {length}"] if length is not None else []
    return "".join(f"{line}\r\n" for line in [*lines, ""]).encode()


def post(messages, path="/v1/chat/completions", **more):
    body = json.dumps({"messages": messages, **more}).encode()
    return head(path, len(body)) + body


# --- S18: at once ------------------------------------------------------------------------------------


@pytest.fixture
def many_files():
    """As many open connections as the test wants."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 4000
    if hard != resource.RLIM_INFINITY and hard < wanted:
        pytest.skip(f"this process may open {hard} files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.security("S18")
def test_a_thousand_idle_connections_and_a_flood_of_new_ones(guarded, many_files, neighbour):
    """The neighbour's own connection is among them."""
    asked = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with ExitStack() as stack:
        idle = [stack.enter_context(Wire(guarded.url)) for _ in range(1000)]
        for wire in idle:
            wire.send(asked)
        assert all(wire.receive().startswith(b"HTTP/1.1 200 ") for wire in idle)
        with guarded.client(headers={"X-API-Key": BOB}, verify=False) as newcomer:
            assert answer_about(newcomer, data_url("word.png")) == "WEMM"
        # More than the service takes: who has waited longest goes.
        flood = [stack.enter_context(Wire(guarded.url)) for _ in range(1500)]
        with guarded.client(headers={"X-API-Key": BOB}, verify=False) as newcomer:
            assert answer_about(newcomer, data_url("word.png")) == "WEMM"
        flood[-1].send(asked)
        assert flood[-1].receive().startswith(b"HTTP/1.1 200 ")
        idle[0].rest(5)
    wait_until(lambda: len(psutil.Process(guarded.process.pid).net_connections()) < 50)


@pytest.mark.security("S18")
def test_half_requests_take_no_place_from_whole_ones(guarded, many_files, neighbour):
    """Two thousand that stop somewhere in their headers, a hundred that stop in their bodies."""
    with ExitStack() as stack:
        for i in range(2000):
            wire = stack.enter_context(Wire(guarded.url))
            wire.send(head()[: 1 + i % 60])
        for _ in range(100):
            wire = stack.enter_context(Wire(guarded.url))
            wire.send(head(length=MAX_BODY) + b'{"messages":[')
        with guarded.client(headers={"X-API-Key": BOB}, verify=False) as newcomer:
            assert answer_about(newcomer, data_url("word.png")) == "WEMM"


NO_REQUESTS = [
    b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 1000 + b"\r\n",
    b"GET / HTTP/1.1\r\nX: " + b"y" * 2**20,
    b"GET /" + b"y" * 2**20,
    b"y" * 2**20,
    b"\r\n" * 2**19,
    b"\0" * 2**20,
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(1000),
    b"GET / HTTP/2.0\r\nHost: localhost\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET http://127.0.0.1:1/ HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"CONNECT 127.0.0.1:1 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"TRACE / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: upgrade\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n",
]


@pytest.mark.security("S18")
def test_what_is_no_request_is_answered_with_an_error_or_nothing(guarded, neighbour, each):
    for sent in each(NO_REQUESTS):
        with Wire(guarded.url) as wire:
            try:
                wire.send(sent)
                answer = wire.receive(seconds=HEADER_SECONDS + 2)
            except (ConnectionError, TimeoutError):
                answer = b""
        assert answer == b"" or answer.split(b" ")[1] == b"505" or answer.split(b" ")[1][:1] == b"4"


@pytest.mark.security("S18")
def test_a_thousand_requests_in_one_go_are_answered_one_after_the_other(guarded, neighbour):
    with Wire(guarded.url) as wire:
        wire.send(
            head("/v1/models", method="GET") * 1000
            + head("/v1/models", method="GET")[:-2]
            + b"Connection: close\r\n\r\n"
        )
        assert wire.rest().count(b"HTTP/1.1 200 ") == 1001


# --- S18 and S5: in the long run ---------------------------------------------------------------------


class Patience:
    """Attacks that take a minute, all in the same one. `results`: name → what came of it and after how long."""

    def __init__(self) -> None:
        self.results: dict[str, Future] = {}
        self._pool = ThreadPoolExecutor(10)

    def start(self, name, attack, *arguments):
        def run():
            started = time.monotonic()
            return attack(*arguments), time.monotonic() - started

        self.results[name] = self._pool.submit(run)

    def close(self):
        self._pool.shutdown()


def trickle(url, start, piece, pause):
    """All that came back until the service had closed."""
    with Wire(url) as wire:
        wire.send(start)
        stop = threading.Event()

        def send():
            try:
                while not stop.wait(pause):
                    wire.send(piece)
            except OSError:
                pass

        sending = threading.Thread(target=send)
        sending.start()
        try:
            return wire.rest(100)
        finally:
            stop.set()
            sending.join()


def read_late(url, start, seconds):
    """What there still is to read."""
    with Wire(url, receive_buffer=4096) as wire:
        wire.send(start)
        time.sleep(seconds)
        return wire.rest(100)


@pytest.fixture(scope="module")
def patience(guarded, alice, gallery):
    ok = b"HTTP/1.1 200 OK\r\n"
    gallery.pages |= {
        "/drops": endless(ok + b"\r\n", b"a", pause=1),
        "/headers": endless(ok, b"X: y\r\n", pause=1),
        "/silence": lambda connection: connection.recv(1),
        "/continue": endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n", pause=0.001),
    }
    # Seven megabytes of events: more than all buffers between two programs hold.
    stream = {"stream": True, "n": 5, "logprobs": True, "top_logprobs": 20, "temperature": 1.0, **ENDLESS}
    patience = Patience()
    for path in ("/drops", "/headers", "/silence", "/continue"):
        patience.start(path, refusal_of, alice, f"{gallery.url}{path}")
    patience.start("headers", trickle, guarded.url, b"GET / HTTP/1.1\r\n", b"X", 0.5)
    patience.start("body", trickle, guarded.url, head(length=10_000), b" ", 1)
    patience.start(
        "chunks", trickle, guarded.url, head()[:-2] + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n", 1
    )
    patience.start("unread", read_late, guarded.url, post(conversation("word.png"), **stream), WRITE_SECONDS + 25)
    yield patience
    patience.close()


@pytest.mark.slow
@pytest.mark.security("S5")
@pytest.mark.parametrize("path", ["/drops", "/headers", "/silence", "/continue"])
def test_a_slow_server_is_given_a_minute_in_all(patience, gallery, path):
    reason, seconds = patience.results[path].result()
    assert reason == f"http://127.0.0.1 took longer than {FETCH_SECONDS} s"
    assert FETCH_SECONDS - 1 < seconds < FETCH_SECONDS + 10
    assert gallery.requested.count(path) == 1
    wait_until(lambda: path in gallery.ended)


@pytest.mark.slow
@pytest.mark.security("S18")
def test_headers_that_trickle_are_waited_for_ten_seconds(patience):
    answer, seconds = patience.results["headers"].result()
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert HEADER_SECONDS - 1 < seconds < HEADER_SECONDS + 5


@pytest.mark.slow
@pytest.mark.security("S18")
@pytest.mark.parametrize("name", ["body", "chunks"])
def test_a_body_that_trickles_is_waited_for_a_minute(patience, name):
    answer, seconds = patience.results[name].result()
    assert answer.startswith(b"HTTP/1.1 408 ")
    # What still comes is thrown away for as long as headers may take.
    assert BODY_SECONDS - 1 < seconds < BODY_SECONDS + HEADER_SECONDS + 5


@pytest.mark.slow
@pytest.mark.security("S18")
def test_a_stream_that_nobody_reads_is_cut(patience, admin):
    """After a minute in which nothing was taken; nothing of it is computed any more."""
    read, _ = patience.results["unread"].result()
    assert read.startswith(b"HTTP/1.1 200 ")
    assert b"data: [DONE]" not in read
    assert figure(admin, "wemm_requests_running") == figure(admin, "wemm_requests_waiting") == 0


# --- S19 ---------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_is_left(admin):
    """In the end no answer is computed or waited for, and no block is held."""
    yield
    for name in ("wemm_requests_running", "wemm_requests_waiting", "wemm_kv_cache_usage"):
        wait_until(lambda name=name: figure(admin, name) == 0, 5)


def cancelled(admin, stage):
    return figure(admin, f'wemm_cancelled_total{{model_name="nano",stage="{stage}"}}')


@pytest.mark.security("S19")
@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_who_leaves_while_uploading(guarded, admin, nothing_is_left, share):
    before = cancelled(admin, "upload")
    sent = post(conversation("word.png"))
    start = sent.index(b"\r\n\r\n") + 4
    with Wire(guarded.url) as wire:
        wire.send(sent[: start + int(share * (len(sent) - start))])
        time.sleep(0.2)
    wait_until(lambda: cancelled(admin, "upload") == before + 1, 3)


@pytest.mark.security("S19")
@pytest.mark.parametrize("pages", ["headers", "drops"])
def test_who_leaves_while_an_image_is_fetched(guarded, admin, gallery, nothing_is_left, pages):
    before = cancelled(admin, "fetch")
    ok = b"HTTP/1.1 200 OK\r\n"
    gallery.pages["/left"] = endless(ok + (b"\r\n" if pages == "drops" else b""), b"X: y\r\n", pause=0.05)
    gallery.ended.clear()
    with Wire(guarded.url) as wire:
        wire.send(post(about(f"{gallery.url}/left")))
        wait_until(lambda: "/left" in gallery.requested)
        time.sleep(0.2)
    wait_until(lambda: cancelled(admin, "fetch") == before + 1, 3)
    wait_until(lambda: "/left" in gallery.ended, 3)
    gallery.requested.clear()


@pytest.mark.security("S19")
def test_who_leaves_while_an_image_is_decoded(guarded, admin, alice, nothing_is_left):
    """The decoder ends within its own limit of time at the latest."""
    before = cancelled(admin, "prepare")
    with Wire(guarded.url) as wire:
        wire.send(post(about(url_of(CPU_BOMB))))
        time.sleep(0.5)
    wait_until(lambda: cancelled(admin, "prepare") == before + 1, 3)
    started = time.monotonic()
    assert answer_about(alice, data_url("word.png")) == "WEMM"
    assert time.monotonic() - started < DECODE_SECONDS + 2


@pytest.mark.security("S19")
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("wait_for", ["nothing", "running", "answer"])
def test_who_leaves_while_an_answer_is_computed(guarded, admin, nothing_is_left, stream, wait_for):
    if wait_for == "answer" and not stream:
        pytest.skip("there is none before the end")
    before = figure(admin, "wemm_cancelled_total")
    with Wire(guarded.url) as wire:
        wire.send(post(conversation("word.png"), stream=stream, n=4, **ENDLESS))
        if wait_for == "running":
            wait_until(lambda: figure(admin, "wemm_requests_running") == 4)
            assert figure(admin, "wemm_kv_cache_usage") > 0
        elif wait_for == "answer":
            assert wire.receive().startswith(b"HTTP/1.1 200 ")
    wait_until(lambda: figure(admin, "wemm_cancelled_total") == before + 1, 3)


@pytest.mark.security("S19")
@pytest.mark.parametrize(
    "path", ["/v1/completions", "/generate", "/generate_stream", "/infer", "/v2/models/nano/generate"]
)
def test_so_it_is_on_other_routes(guarded, admin, nothing_is_left, path):
    before = cancelled(admin, "generate")
    # Drawn at random: these dialects cannot be asked to go on behind the end.
    drawn = {"parameters": {"max_new_tokens": 900, "temperature": 100.0, "seed": 1}}
    bodies = {
        "/v1/completions": {"prompt": ["?"] * 4, **ENDLESS},
        "/generate": {"prompt": "?", **ENDLESS},
        "/v2/models/nano/generate": {"text_input": "?", **drawn},
    }
    body = json.dumps(bodies.get(path, {"inputs": "?", **drawn}))
    with Wire(guarded.url) as wire:
        wire.send(head(path, len(body)) + body.encode())
        wait_until(lambda: figure(admin, "wemm_requests_running") > 0)
    wait_until(lambda: cancelled(admin, "generate") == before + 1, 3)


@pytest.mark.security("S19")
def test_who_resets_the_connection(guarded, admin, nothing_is_left):
    """Half closed is not gone: whoever has said all may wait for the answer."""
    host, port = guarded.url.removeprefix("http://").split(":")
    for how in ("reset", "half"):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(post(conversation("word.png"), max_tokens=8))
            if how == "reset":
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            else:
                connection.shutdown(socket.SHUT_WR)
                connection.settimeout(10)
                connection.recv(2**16)


@pytest.mark.security("S19")
def test_a_hundred_who_leave_at_any_moment(guarded, admin, neighbour, nothing_is_left):
    """Somebody who stays is answered all the same, and counts right."""
    before = figure(admin, "wemm_cancelled_total")

    def leave(i):
        with Wire(guarded.url) as wire:
            wire.send(post(conversation("shapes.png"), stream=bool(i % 2), **ENDLESS))
            time.sleep(0.002 * i)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(leave, range(100)))
    wait_until(lambda: figure(admin, "wemm_cancelled_total") == before + 100)


@pytest.mark.security("S19")
def test_who_gives_up_waiting_is_a_client_that_left(alice, admin, nothing_is_left):
    before = figure(admin, "wemm_cancelled_total")
    with pytest.raises(httpx.ReadTimeout):
        alice.post("/v1/chat/completions", json={"messages": conversation("word.png"), **ENDLESS}, timeout=0.3)
    wait_until(lambda: figure(admin, "wemm_cancelled_total") == before + 1, 3)
    assert chat(alice, conversation("word.png")).status_code == 200
