"""What an operator relies on: readiness, recovery, bounds, a clean end."""

from __future__ import annotations

import base64
import concurrent.futures
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import httpx
import psutil
import pytest
from PIL import Image

from tests.server.conftest import QUESTIONS, conversation

ENDLESS = {"max_tokens": 900, "ignore_eos": True, "repetition_guard": False}


def _ask(client, name="word.png", **more):
    return client.post("/v1/chat/completions", json={"messages": conversation(name), **more})


def _engine(service):
    [engine] = _engines(service)
    return engine


def _engines(service):
    return [
        child
        for child in psutil.Process(service.process.pid).children()
        if "wemm.engine.engine_host" in child.cmdline()
    ]


def _gauge(client, name):
    return float(re.search(rf"^{name}{{[^}}]*}} (\S+)$", client.get("/metrics").text, re.MULTILINE)[1])


def _until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError(condition)


def test_not_ready_before_it_has_answered(serve):
    service = serve()
    with service.client() as client:
        assert client.get("/health").status_code == 200
        early = client.get("/ready")
        refused = _ask(client)
        assert (early.status_code, refused.status_code) == (503, 503)
        assert early.json()["reason"] in ("the model is being loaded", "the engine is warming up")
        assert int(refused.headers["retry-after"]) >= 1
        service.wait_until_ready()
        # The warm-up went through the tower: the first user does not wait for it.
        assert _gauge(client, "wemm_image_cache_misses_total") == 1
        assert _ask(client).json()["choices"][0]["message"]["content"] == "WEMM"


def test_a_model_that_cannot_be_loaded_ends_the_service():
    command = [sys.executable, "-m", "wemm", "serve", "--model", "nano", "--port", "0", "--max-model-len", "1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("error: max_model_len must be in [2, ")


def test_a_service_that_is_stopped_while_it_loads_ends_at_once(serve):
    service = serve()
    engine = _until(lambda: _engines(service))[0]
    assert service.stop() == 0
    _until(lambda: not engine.is_running())


def test_a_killed_engine_is_replaced_and_nobody_waits_for_it(serve):
    service = serve("--max-restarts", "1").wait_until_ready()
    with service.client() as client, concurrent.futures.ThreadPoolExecutor(9) as pool:
        whole = [pool.submit(_ask, client, **ENDLESS) for _ in range(4)]
        streams = [pool.submit(_ask, client, stream=True, **ENDLESS) for _ in range(4)]
        _until(lambda: _gauge(client, "wemm_requests_running") == 8)
        _engine(service).kill()
        for response in (future.result(60) for future in whole):
            assert response.status_code == 503, response.text
            assert response.json()["error"]["code"] == "unavailable"
            assert "killed by signal 9" in response.json()["error"]["message"]
            assert response.headers["retry-after"]
        for response in (future.result(60) for future in streams):
            if response.status_code == 200:  # it had begun
                *_, failure, done = [line for line in response.text.split("\n\n") if line]
                assert json.loads(failure.removeprefix("data: "))["error"]["code"] == "unavailable"
                assert done == "data: [DONE]"
        red = client.get("/ready")
        assert red.status_code == 503
        assert "started again" in red.json()["reason"] or "warming up" in red.json()["reason"]
        service.wait_until_ready()
        assert _ask(client).json()["choices"][0]["message"]["content"] == "WEMM"
        assert _gauge(client, "wemm_engine_restarts_total") == 1
        # Once is what was allowed.
        _engine(service).kill()
        _until(lambda: "died 2 times; restart the service" in client.get("/ready").text)
        assert client.get("/health").status_code == 200
        assert _ask(client).status_code == 503
    assert service.stop() == 0


def test_requests_under_way_finish_when_the_service_is_stopped(serve):
    service = serve().wait_until_ready()
    engine = _engine(service)
    with service.client() as client, concurrent.futures.ThreadPoolExecutor(2) as pool:
        answer = pool.submit(_ask, client, "shapes.png", **{**ENDLESS, "max_tokens": 200})
        _until(lambda: _gauge(client, "wemm_requests_running") >= 1)
        service.process.send_signal(signal.SIGTERM)
        assert answer.result(60).json()["usage"]["completion_tokens"] == 200
    assert service.process.wait(60) == 0
    assert not engine.is_running()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{service.url}/health")


def test_too_many_requests_are_told_when_to_come_again(serve):
    service = serve("--max-queued-requests", "2", "--max-num-seqs", "1").wait_until_ready()
    with service.client() as client, concurrent.futures.ThreadPoolExecutor(8) as pool:
        responses = [f.result(60) for f in [pool.submit(_ask, client, **ENDLESS) for _ in range(8)]]
        statuses = sorted(response.status_code for response in responses)
        assert statuses[:1] == [200]
        assert statuses[-1] == 429
        for response in responses:
            if response.status_code == 429:
                assert 1 <= int(response.headers["retry-after"]) <= 60
                assert response.json()["error"]["type"] == "rate_limit_error"
        assert _ask(client).status_code == 200
        # By size, not by number alone.
        service.stop()
    service = serve("--max-queued-bytes", "10KiB", "--no-warm-up").wait_until_ready()
    with service.client() as client, concurrent.futures.ThreadPoolExecutor(4) as pool:
        statuses = {f.result(60).status_code for f in [pool.submit(_ask, client, **ENDLESS) for _ in range(4)]}
        assert statuses == {200, 429}


def test_clients_that_leave_at_any_moment_leave_nothing_behind(served):
    """Two hundred of them: during upload, before the answer, in the middle of a stream."""
    body = json.dumps({"messages": conversation("shapes.png"), "stream": True, **ENDLESS}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    port = int(served.url.rsplit(":", 1)[1])

    def leave(i):
        with socket.create_connection(("127.0.0.1", port)) as connection:
            stage = i % 4
            connection.sendall(head + (body[: len(body) * (i % 7) // 7] if stage == 0 else body))
            if stage == 2:
                time.sleep(0.002 * i)
            elif stage == 3:
                connection.recv(1000)

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        list(pool.map(leave, range(200)))
    with served.client() as client:
        for name in (
            "wemm_requests_running",
            "wemm_requests_waiting",
            "wemm_kv_cache_usage",
            "wemm_accepted_requests",
        ):
            _until(lambda name=name: _gauge(client, name) == 0)
        assert _gauge(client, "wemm_accepted_bytes") == 0
        assert _ask(client).json()["choices"][0]["message"]["content"] == "WEMM"


def test_every_stage_is_measured(client):
    before = {
        name: _count(client, name) for name in ("fetch", "decode", "preprocess", "vision", "prefill", "total")
    }
    answer = client.post(
        "/v1/chat/completions",
        json={"messages": [{"role": "user", "content": [_fresh_image(), {"type": "text", "text": "?"}]}]},
    ).json()
    for name, count in before.items():
        assert _count(client, name) == count + 1, name
    page = client.get("/metrics").text
    for kind in ("prompt", "image", "cached", "generation"):
        assert f'wemm_tokens_total{{kind="{kind}",model_name="nano"}}' in page
    assert _count(client, "first_token") == _count(client, "total")
    assert answer["usage"]["prompt_tokens_details"]["image_tokens"] > 2
    client.post("/v1/chat/completions", json={"messages": []})
    assert 'wemm_errors_total{model_name="nano",type="invalid_request"}' in client.get("/metrics").text


def _count(client, stage):
    name = f"wemm_{stage}_seconds_count"
    return _gauge(client, name)


def _fresh_image():
    data = io.BytesIO()
    Image.frombytes("RGB", (40, 40), os.urandom(4800)).save(data, "PNG")
    url = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_thirty_two_clients_for_five_minutes(served):
    """Streams with images; each client checks its own answer, and memory stays where it is."""
    deadline = time.monotonic() + 300
    processes = [psutil.Process(served.process.pid), *psutil.Process(served.process.pid).children(recursive=True)]

    def rss():
        return sum(process.memory_info().rss for process in processes) / 2**20

    def run(i):
        done = 0
        with served.client() as client:
            while time.monotonic() < deadline:
                name = list(QUESTIONS)[(i + done) % len(QUESTIONS)]
                response = _ask(client, name, stream=True)
                assert response.status_code == 200, response.text
                chunks = [json.loads(e[6:]) for e in response.text.split("\n\n") if e and e != "data: [DONE]"]
                text = "".join(choice["delta"].get("content", "") for c in chunks for choice in c["choices"])
                assert text == QUESTIONS[name][1], text
                done += 1
        return done

    with concurrent.futures.ThreadPoolExecutor(32) as pool:
        futures = [pool.submit(run, i) for i in range(32)]
        time.sleep(60)
        early = rss()
        answers = sum(future.result() for future in futures)
        late = rss()
    print(f"{answers} answers in 300 s, {early:.0f} MiB after one minute, {late:.0f} MiB after five")
    assert answers > 320
    assert late < 1.05 * early
