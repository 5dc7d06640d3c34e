"""S23: the log is one JSON object per line, holds nothing of what users wrote, and cannot be forged."""

from __future__ import annotations

import json
import re

import pytest

from tests.server.conftest import IMAGES, conversation, data_url
from tests.server.security.conftest import ALICE, Wire, about, answer_about, chat, wait_until

pytestmark = pytest.mark.security("S23")

SECRET = "swordfish5077"
DIRTY = f'\r\n\x1b[2J\x1b]0;{SECRET}\x07\x9b31m\u2028{SECRET}\n{{"level":"error","message":"{SECRET}"}}\n\0'
_STRETCH = 40


@pytest.fixture
def log(guarded):
    """Lines of the service since the test began, once it has written down a request that came after all others."""
    start = len(guarded.log)

    def lines():
        with guarded.client(verify=False) as client:
            last = client.get("/health").headers["x-request-id"]
        wait_until(lambda: any(last in line for line in guarded.log[start:]))
        return guarded.log[start:]

    return lines


def assert_clean(lines):
    for line in lines:
        assert isinstance(json.loads(line), dict), line
        assert line.isascii()
        assert line.removesuffix("\n").isprintable()
        assert SECRET not in line


def asked(content):
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 4}


CHAT = "/v1/chat/completions"
REQUESTS = {
    "prompt": (CHAT, asked(DIRTY)),
    "stream": (CHAT, {**asked(DIRTY), "stream": True}),
    "role": (CHAT, {"messages": [{"role": DIRTY, "content": "?"}]}),
    "type of a part": (CHAT, asked([{"type": DIRTY}])),
    "model": (CHAT, {**asked("?"), "model": DIRTY}),
    "stop": (CHAT, {**asked("?"), "stop": [DIRTY]}),
    "user": (CHAT, {**asked("?"), "user": DIRTY}),
    "number": (CHAT, {**asked("?"), "max_tokens": DIRTY}),
    "unknown field": (CHAT, {**asked("?"), DIRTY: DIRTY}),
    "expression": (CHAT, {**asked("?"), "structured_outputs": {"regex": f"({DIRTY}"}}),
    "grammar": (CHAT, {**asked("?"), "structured_outputs": {"grammar": DIRTY}}),
    "schema": (
        CHAT,
        {
            **asked("?"),
            "response_format": {"type": "json_schema", "json_schema": {"name": DIRTY, "schema": {"type": DIRTY}}},
        },
    ),
    "URL": (CHAT, {"messages": about(f"http://public.example/{DIRTY}")}),
    "URL of no host": (CHAT, {"messages": about(f"http://{SECRET}.example.org/{SECRET}")}),
    "URL that is not there": (
        CHAT,
        {"messages": about(f"http://public.example/{SECRET}?token={SECRET}#{SECRET}")},
    ),
    "URL with a password": (CHAT, {"messages": about(f"http://user:{SECRET}@public.example/word.png")}),
    "scheme": (CHAT, {"messages": about(f"{SECRET}:{DIRTY}")}),
    "file": (CHAT, {"messages": about(f"file:///{SECRET}/{DIRTY}")}),
    "no base64": (CHAT, {"messages": about(f"data:image/png;base64,{DIRTY}")}),
    "no image": (CHAT, {"messages": about(f"data:text/{SECRET},{SECRET}")}),
    "completion": ("/v1/completions", {"prompt": DIRTY, "max_tokens": 4}),
    "tokens": ("/tokenize", {"prompt": DIRTY}),
    "MindIE": ("/infer", {"inputs": DIRTY}),
    "TGI": ("/generate", {"inputs": DIRTY, "parameters": {"max_new_tokens": 4}}),
    "Triton": ("/v2/models/nano/generate", {"id": DIRTY, "text_input": DIRTY}),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_nothing_that_a_user_wrote_is_logged(alice, log, name):
    path, body = REQUESTS[name]
    answered = alice.post(path, json=body)
    assert answered.status_code < 500, answered.text
    lines = log()
    assert any(answered.headers["x-request-id"] in line for line in lines)
    assert_clean(lines)


@pytest.mark.parametrize("body", [DIRTY, f'{{"messages":"{SECRET}"', f"[{SECRET}]", f'"{SECRET}'])
def test_bodies_that_are_no_json_are_not_logged(alice, log, body):
    assert alice.post(CHAT, content=body.encode()).status_code == 400
    assert_clean(log())


def test_queries_and_keys_are_not_logged(guarded, alice, log):
    assert alice.get("/v1/models", params={"key": SECRET}).status_code == 200
    with guarded.client(verify=False) as client:
        for headers in (
            {"Authorization": f"Bearer {SECRET}-0123456789"},
            {"X-API-Key": f"{SECRET}-0123456789"},
            {"Cookie": SECRET, "User-Agent": SECRET, "Referer": f"http://{SECRET}/"},
        ):
            assert client.get("/v1/models", headers=headers).status_code == 401
        client.get("/health", headers={"Host": f"{SECRET}.example"})
        client.get("/health", headers={"Origin": f"http://{SECRET}.example"})
    lines = log()
    assert_clean(lines)
    assert ALICE not in "".join(lines)


def test_neither_images_nor_answers_are_logged(alice, log):
    url = data_url("word.png")
    answer = answer_about(alice, url)
    streamed = chat(alice, conversation("shapes.png"), stream=True)
    assert "blue" in streamed.text
    chat(alice, about(url[: len(url) // 2]))
    chat(alice, about("data:image/png;base64," + url[-2000:]))
    lines = log()
    assert_clean(lines)
    text = "".join(lines)
    assert answer == "WEMM"
    assert answer not in text
    assert "blue" not in text
    stretches = {url[i : i + _STRETCH] for i in range(len(url) - _STRETCH)}
    stretches |= {(IMAGES / "word.png").read_bytes().hex()[:_STRETCH]}
    assert not any(line[i : i + _STRETCH] in stretches for line in lines for i in range(len(line)))


def test_a_path_cannot_forge_a_line(guarded, log):
    for path in ("/%0a%7b%22level%22%3a%22error%22%7d", "/%1b%5b2J", "/%c2%9b31m", "/%e2%80%a8", "/" + "a" * 5000):
        with Wire(guarded.url) as wire:
            wire.send(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
            assert wire.rest().startswith(b"HTTP/1.1 4")
    lines = log()
    assert_clean(lines)
    assert all(len(line) < 1000 for line in lines)
    assert not any(json.loads(line)["level"] == "error" for line in lines)


# --- x-request-id ------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["a", "7", "5f2c-11.B_x:1", "a" * 128])
def test_a_harmless_id_is_kept(alice, log, given):
    answered = alice.get("/v1/models", headers={"X-Request-ID": given})
    assert answered.headers["x-request-id"] == given
    assert any(json.loads(line).get("request_id") == given for line in log())


HARMFUL = {
    "ANSI": f"\x1b[31m{SECRET}".encode(),
    "C1": f"\x9b31m{SECRET}".encode("latin-1"),
    "line": f"a\n{SECRET}".encode(),
    "carriage return": f"a\r{SECRET}".encode(),
    "folded": f"a\r\n {SECRET}".encode(),
    "another header": f"a\r\nx-other: {SECRET}".encode(),
    "nul": f"a\0{SECRET}".encode(),
    "space": f"a {SECRET}".encode(),
    "quote": f'a","secret":"{SECRET}'.encode(),
    "HTML": f"<script>{SECRET}</script>".encode(),
    "escaped": f"a%0d%0ax-other:%20{SECRET}".encode(),
    "no ASCII": f"é{SECRET}".encode(),
    "long": SECRET.encode() * 10,
    "empty": b"",
}


@pytest.mark.parametrize("name", HARMFUL)
def test_any_other_id_is_replaced(guarded, log, name):
    given = HARMFUL[name]
    with Wire(guarded.url) as wire:
        wire.send(
            b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nX-Request-ID: " + given + b"\r\n\r\n"
        )
        head = wire.rest().partition(b"\r\n\r\n")[0].decode("latin-1").lower()
    status = head.split()[1]
    assert status in ("200", "400")
    assert SECRET not in head
    assert "x-other" not in head
    ids = re.findall(r"^x-request-id: (.*)$", head.replace("\r", ""), re.MULTILINE)
    # What is no HTTP has no id; "a" is what is left before another header.
    assert all(re.fullmatch(r"[0-9a-f]{32}|a", found) for found in ids)
    assert status == "400" or len(ids) == 1
    assert_clean(log())


def test_all_lines_are_json_objects(guarded, log):
    """Of the whole life of the service, from when it listened."""
    log()
    [listening] = [i for i, line in enumerate(guarded.log) if line.startswith("listening on ")]
    for line in guarded.log[listening + 1 :]:
        entry = json.loads(line)
        assert {"time", "level", "logger"} <= set(entry)
