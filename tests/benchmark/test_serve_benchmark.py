"""The load is open, the figures are those of the answers, and whatever goes wrong is counted or told."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image

httpx = pytest.importorskip("httpx")

from tests.server.conftest import Served
from wemm.benchmark.load import Exchange, departures, offer, read_answer
from wemm.benchmark.load_figures import ServiceLevel, chart, figures, percentiles, table, warnings
from wemm.benchmark.serve import ServeBenchmark, measure
from wemm.errors import ParameterError
from wemm.progress import silent

KEY = "a-key-of-the-test"


class Endpoint:
    """An HTTP server that answers request number i as `script(i)` says; it notes what it was asked and when."""

    def __init__(self, script):
        self.script = script
        self.bodies, self.arrivals, self.headers = [], [], []
        self.num_open = self.most_open = 0

    async def __call__(self, reader, writer):
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                lines = head.decode().split("\r\n")
                headers = {
                    name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
                }
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                await self._answer(lines[0], headers, body, writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _answer(self, line, headers, body, writer):
        self.headers.append(headers)
        if line.startswith("GET /v1/models "):
            _write(writer, 200, {"data": [{"id": "scripted"}]})
            return
        self.arrivals.append(asyncio.get_running_loop().time())
        self.bodies.append(json.loads(body))
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        await self.script(len(self.bodies) - 1, writer)
        self.num_open -= 1


def _write(writer, status, data):
    body = json.dumps(data).encode()
    writer.write(b"HTTP/1.1 %d x\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body))


def _chunk(writer, text):
    writer.write(b"%x\r\n%s\r\n" % (len(text), text))


def _event(**data):
    return b"data: " + json.dumps(data).encode() + b"\n\n"


ROLE = _event(choices=[{"delta": {"role": "assistant", "content": ""}}])
TOKEN = _event(choices=[{"delta": {"content": "x"}}])
LAST = _event(choices=[{"delta": {}, "finish_reason": "length"}])
USAGE = _event(choices=[], usage={"prompt_tokens": 100, "completion_tokens": 4})
DONE = b"data: [DONE]\n\n"


async def _stream(writer, *events, before=0.0, between=0.0):
    await asyncio.sleep(before)
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Type: text/event-stream\r\n\r\n")
    for event in events:
        _chunk(writer, event)
        await writer.drain()
        await asyncio.sleep(between)
    _chunk(writer, b"")


async def whole(i, writer, **delays):
    await _stream(writer, ROLE, *[TOKEN] * 4, LAST, USAGE, DONE, **delays)


@contextmanager
def serving(script):
    """The endpoint in a thread of its own, and its URL."""
    endpoint, loop = Endpoint(script), asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def start():
        return await asyncio.start_server(endpoint, "127.0.0.1", 0, limit=2**24)

    async def stop():
        server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    server = asyncio.run_coroutine_threadsafe(start(), loop).result()
    try:
        port = server.sockets[0].getsockname()[1]
        yield endpoint, f"http://127.0.0.1:{port}/v1"
    finally:
        asyncio.run_coroutine_threadsafe(stop(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def _settings(url, **options):
    return ServeBenchmark(**{"base_url": url, "image_size": "none", "output_len": 4, "requests": 8, **options})


def test_departures_do_not_wait_for_answers():
    """Nobody is answered before all have asked: a closed loop, or one with few connections, would never end."""
    all_here = asyncio.Event()

    async def script(i, writer):
        if i == 120:  # 0 is the check
            all_here.set()
        if i:
            await asyncio.wait_for(all_here.wait(), 20)
        await whole(i, writer)

    with serving(script) as (endpoint, url):
        [rate] = measure(_settings(url, requests=120, request_rate="1000"))["rates"]
    assert (rate["num_requests"], rate["num_errors"]) == (120, 0)
    assert endpoint.most_open == 120


@pytest.mark.parametrize("delay", [0.0, 0.4])
def test_when_a_request_is_due_does_not_depend_on_answers(delay):
    """The moments are those drawn, exactly; nothing leaves before its own."""
    drawn = departures(40, 8, 1.0, np.random.default_rng(7))

    async def load():
        async with httpx.AsyncClient(trust_env=False) as client:
            return await offer(client, f"{url}/chat/completions", [b"{}"] * 8, drawn, 60)

    with serving(lambda i, writer: whole(i, writer, before=delay)) as (_, url):
        exchanges = asyncio.run(load())
    assert [exchange.due - exchanges[0].due for exchange in exchanges] == pytest.approx(drawn, abs=1e-6)
    assert all(exchange.due <= exchange.woken <= exchange.sent <= exchange.ended for exchange in exchanges)
    assert [read_answer(exchange).error for exchange in exchanges] == [None] * 8


def test_the_cap_holds_and_what_it_costs_is_queue():
    with serving(lambda i, writer: whole(i, writer, before=0.05)) as (endpoint, url):
        [rate] = measure(_settings(url, max_concurrency=2))["rates"]
    assert endpoint.most_open == 2
    seconds = rate["seconds"]
    assert seconds["queue"]["worst"] >= 3 * 0.04
    assert seconds["first_token"]["worst"] >= seconds["queue"]["worst"]


def test_errors_are_counted_by_kind_and_in_no_percentile():
    async def script(i, writer):
        kinds = {
            1: lambda: _write(writer, 429, {"error": {"message": "busy"}}),
            2: lambda: _write(writer, 503, {}),
            3: lambda: writer.close(),
            4: lambda: _stream(writer, ROLE, TOKEN),  # ends without an end
            5: lambda: _stream(writer, ROLE, TOKEN, _event(error={"message": "broken"}), DONE),
            6: lambda: whole(i, writer, before=60),
            7: lambda: _stream(writer, ROLE, LAST, DONE),
            8: lambda: _write(writer, 200, ["no stream"]),
        }
        done = kinds.get(i, lambda: whole(i, writer))()
        if done is not None:
            await done

    with serving(script) as (_, url):
        result = measure(_settings(url, requests=10, request_rate="50", timeout=4.0))
    [rate] = result["rates"]
    assert rate["errors"] == {
        "429": 1, "503": 1, "dropped": 3, "error in the stream": 1, "timeout": 1, "no token": 1,
    }  # fmt: skip
    assert rate["num_errors"] == sum(rate["errors"].values()) == 8
    assert rate["num_requests"] == 10
    assert rate["output_tokens_per_s"] * rate["duration"] == pytest.approx(2 * 4)
    assert rate["requests_per_s"] * rate["duration"] == pytest.approx(2)
    assert "8 of 10 requests failed" in warnings(result)[-1]


def test_nothing_answered_is_still_a_result(tmp_path):
    async def script(i, writer):
        await whole(i, writer) if i == 0 else _write(writer, 429, {})

    with serving(script) as (_, url):
        result = measure(_settings(url, slo_first_token=1.0))
    assert result["rates"][0]["errors"] == {"429": 8}
    assert result["rates"][0]["goodput"] == {"requests_per_s": 0.0, "share": 0.0}
    assert json.loads(json.dumps(result)) == result
    columns, [row] = table(result)
    assert len(columns) == len(row)
    with pytest.raises(ParameterError, match="no request was answered"):
        chart(result, tmp_path / "x.png")


def test_the_request_is_what_was_asked_for(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "from-the-environment")
    with serving(whole) as (endpoint, url):
        result = measure(_settings(url, image_size="40x30", requests=2, words=3, output_len=9))
        measure(_settings(url, requests=1, ignore_eos=False, api_key="given", model="other"))
    assert result["settings"]["model"] == "scripted"
    assert "api_key" not in result["settings"]
    assert endpoint.headers[1]["authorization"] == "Bearer from-the-environment"
    assert endpoint.headers[-1]["authorization"] == "Bearer given"
    first, last = endpoint.bodies[1], endpoint.bodies[-1]
    assert first["stream"] is True
    assert first["stream_options"] == {"include_usage": True}
    assert (first["model"], first["max_tokens"], first["ignore_eos"]) == ("scripted", 9, True)
    image, text = first["messages"][0]["content"]
    head, _, data = image["image_url"]["url"].partition("base64,")
    assert head == "data:image/jpeg;"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (40, 30)
    assert len(text["text"].split()) == 1 + 3
    assert last["model"] == "other"
    assert not {"ignore_eos", "repetition_guard"} & set(last)


def test_every_rate_asks_something_else_and_the_seed_brings_it_back():
    def asked(seed):
        with serving(whole) as (endpoint, url):
            result = measure(
                _settings(url, request_rate="100,inf", requests=3, image_size="16x16", workload_seed=seed)
            )
        assert [rate["request_rate"] for rate in result["rates"]] == [100.0, "inf"]
        return sorted(json.dumps(body["messages"]) for body in endpoint.bodies)

    first, again, other = asked(0), asked(0), asked(10)
    assert len(set(first)) == 1 + 2 * 3
    assert first == again
    assert not set(first) & set(other)


def test_progress_counts_every_answer():
    counted = []

    @contextmanager
    def progress(description, total, unit):
        counted.append(total)
        yield lambda amount: counted.append(-amount)

    with serving(whole) as (_, url):
        measure(_settings(url, requests=5), progress)
    assert counted == [5, *[-1] * 5]


@pytest.mark.parametrize(
    ("status", "body", "remedy"),
    [
        (401, {"error": {"message": "who are you?"}}, "--api-key"),
        (404, {"error": {"message": "no such model"}}, "--model"),
        (400, {"error": {"message": "unknown field ignore_eos"}}, "--no-ignore-eos"),
        (500, "oops", "try again"),
    ],
)
def test_a_refused_first_request_is_one_line_with_a_remedy(status, body, remedy):
    async def script(i, writer):
        _write(writer, status, body)

    with serving(script) as (endpoint, url), pytest.raises(ParameterError, match=remedy) as caught:
        measure(_settings(url, model="m"))
    message = str(caught.value)
    assert f"{url}/chat/completions" in message
    assert str(status) in message
    assert (body if isinstance(body, str) else body["error"]["message"]) in message
    assert "\n" not in message
    assert len(endpoint.bodies) == 1


def test_what_is_no_such_endpoint_is_told_before_the_load():
    async def page(i, writer):
        _write(writer, 200, {"hello": "world"})

    with serving(page) as (_, url):
        with pytest.raises(ParameterError, match="does not stream chat completions"):
            measure(_settings(url))
        with pytest.raises(ParameterError, match="404|no answer"):
            measure(_settings(url.replace("/v1", "/elsewhere"), timeout=1.0))
    with pytest.raises(ParameterError, match=f"no answer from {url}/models.*start the server"):
        measure(_settings(url))


@pytest.mark.parametrize(
    "wrong",
    [
        {"request_rate": "0"}, {"request_rate": "1,"}, {"request_rate": "nan"}, {"requests": 0}, {"timeout": 0.0},
        {"burstiness": float("inf")}, {"image_size": "big"}, {"max_concurrency": 0}, {"base_url": "h:80"},
        {"base_url": "http://user:secret@h/v1"}, {"base_url": "http://h:99999/v1"}, {"slo_first_token": -1.0},
    ],
)  # fmt: skip
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ParameterError) as caught:
        ServeBenchmark(**wrong)
    assert "secret" not in str(caught.value)


def test_a_key_that_no_header_takes_is_refused_without_repeating_it():
    with pytest.raises(ParameterError, match="--api-key") as caught:
        measure(_settings("http://127.0.0.1:9/v1", api_key="sch\nlüssel"))
    assert "lüssel" not in str(caught.value)
    assert "geheim" not in repr(_settings("http://h/v1", api_key="geheim"))


@pytest.mark.parametrize("burstiness", [0.5, 1.0, 8.0])
def test_gaps_have_the_mean_and_the_spread_of_their_distribution(burstiness):
    times = departures(50, 20_000, burstiness, np.random.default_rng(0))
    gaps = np.diff(times)
    assert times[0] == 0
    assert (gaps >= 0).all()
    assert gaps.mean() == pytest.approx(1 / 50, rel=0.05)
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.05)
    assert departures(float("inf"), 3, 1.0, np.random.default_rng(0)) == [0, 0, 0]


def test_percentiles_are_values_that_were_measured():
    values = np.random.default_rng(0).permutation(100) + 1.0
    assert percentiles(values) == {"p50": 50, "p90": 90, "p95": 95, "p99": 99, "worst": 100}
    assert percentiles([3.0]) == dict.fromkeys(("p50", "p90", "p95", "p99", "worst"), 3.0)
    assert percentiles([]) is None


def _exchange(due, first, *later, late=0.0):
    """Tokens at these moments, the last event with them."""
    chunks = [(due + first, ROLE + TOKEN), *((due + moment, TOKEN) for moment in later)]
    usage = _event(choices=[], usage={"prompt_tokens": 50, "completion_tokens": 1 + len(later)})
    end = due + (later or (first,))[-1]
    chunks.append((end, LAST + usage + DONE))
    return Exchange(
        due, woken=due + late, admitted=due + late, sent=due + late, ended=end, status=200, chunks=chunks
    )


def test_latencies_count_from_the_moment_a_request_was_due():
    exchanges = [_exchange(0.0, 1.0, 1.25, 1.75, late=0.5), _exchange(2.0, 0.5, 1.0, 2.0)]
    rate = figures(2.0, exchanges, ServiceLevel(750, 400))
    seconds = rate["seconds"]
    assert (seconds["first_token"]["p50"], seconds["first_token"]["worst"]) == (0.5, 1.0)
    assert (seconds["inter_token"]["p50"], seconds["inter_token"]["worst"]) == (0.5, 1.0)
    assert (seconds["per_token"]["p50"], seconds["per_token"]["worst"]) == (0.375, 0.75)
    assert (seconds["total"]["p50"], seconds["total"]["worst"]) == (1.75, 2.0)
    assert rate["lateness_p99"] == 0.5
    assert rate["duration"] == 4.0
    assert (rate["requests_per_s"], rate["output_tokens_per_s"], rate["prompt_tokens_per_s"]) == (0.5, 1.5, 25.0)
    assert rate["offered_per_s"] == 0.5
    assert rate["goodput"]["share"] == 0.0


@pytest.mark.parametrize(
    ("first_token", "inter_token", "good"),
    [(None, 400, 0.5), (750, None, 0.5), (1000, None, 1.0), (400, None, 0.0), (1000, 800, 1.0)],
)
def test_goodput_are_the_requests_within_both_limits(first_token, inter_token, good):
    exchanges = [_exchange(0.0, 1.0, 1.25, 1.75), _exchange(2.0, 0.5, 1.0, 2.0)]
    assert figures(1.0, exchanges, ServiceLevel(first_token, inter_token))["goodput"]["share"] == good
    assert "goodput" not in figures(1.0, exchanges, ServiceLevel())


def test_a_client_that_leaves_late_says_so():
    punctual, late = ([_exchange(0.0, 1.0, 1.5, late=seconds)] for seconds in (0.001, 0.9))
    assert warnings({"rates": [figures(1.0, punctual, ServiceLevel())]}) == []
    [line] = warnings({"rates": [figures(1.0, late, ServiceLevel())]})
    assert "900 ms late" in line


def test_an_event_arrives_when_its_last_byte_does():
    stream = ROLE + TOKEN + TOKEN + LAST + USAGE + DONE
    bytewise = [(float(i), stream[i : i + 1]) for i in range(len(stream))]
    answer = read_answer(Exchange(0.0, status=200, chunks=bytewise))
    ends = [len(ROLE + TOKEN) - 2, len(ROLE + TOKEN + TOKEN) - 2]  # the line's end; an empty line follows
    assert answer.token_times == tuple(map(float, ends))
    assert (answer.num_output_tokens, answer.num_prompt_tokens, answer.error) == (4, 100, None)
    crlf = Exchange(0.0, status=200, chunks=[(1.0, stream.replace(b"\n", b"\r\n"))])
    assert read_answer(crlf).token_times == (1.0, 1.0)


@pytest.mark.parametrize("junk", [b"data: {\n\n", b"data: 3\n\n", b"data: \xff\n\n", b'data: {"choices": 3}\n\n'])
def test_junk_in_a_stream_is_an_error_of_that_request(junk):
    assert "not a stream" in read_answer(Exchange(0.0, status=200, chunks=[(1.0, junk)])).error


def test_without_usage_the_events_are_counted():
    exchange = Exchange(0.0, status=200, chunks=[(1.0, TOKEN), (2.0, TOKEN), (3.0, LAST)])
    assert read_answer(exchange).num_output_tokens == 2


def test_the_service_itself_under_load(tmp_path):
    """`wemm serve` on nano, with pictures, at two rates; the chart is a picture."""
    pytest.importorskip("matplotlib")
    service = Served("--api-key", KEY)
    try:
        url = f"{service.wait_until_ready().url}/v1"
        settings = _settings(url, image_size="64x64", requests=6, request_rate="20,inf", output_len=8, api_key=KEY)
        result = measure(settings, silent)
        with pytest.raises(ParameterError, match="401"):
            measure(_settings(url, api_key=KEY[::-1]))
        with pytest.raises(ParameterError, match="404"):
            measure(_settings(url, api_key=KEY, model="elsewhere"))
    finally:
        assert service.stop() == 0
    assert result["settings"]["model"] == "nano"
    for rate in result["rates"]:
        assert (rate["num_requests"], rate["num_errors"]) == (6, 0)
        assert rate["output_tokens_per_s"] * rate["duration"] == pytest.approx(6 * 8)
        assert rate["prompt_tokens_per_s"] * rate["duration"] > 6 * 20
        assert rate["seconds"]["first_token"]["worst"] <= rate["seconds"]["total"]["worst"]
    chart(result, tmp_path / "load.png")
    with Image.open(tmp_path / "load.png") as picture:
        assert picture.width > 1000
    with pytest.raises(ParameterError, match="--plot"):
        chart(result, tmp_path / "load.unknown")
