"""Latency of an OpenAI-compatible endpoint under an open load: questions about images at given rates."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import ssl
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

import wemm
from wemm.benchmark.load import departures, offer, read_answer
from wemm.benchmark.load_figures import ServiceLevel, chart, figures, table, warnings
from wemm.benchmark.result import Result, Table, environment
from wemm.benchmark.serve_config import ServeBenchmark
from wemm.benchmark.workload import Workload
from wemm.errors import ParameterError
from wemm.platforms import resolve_platform
from wemm.progress import ProgressBar, silent

if TYPE_CHECKING:
    import httpx

__all__ = ["ServeBenchmark", "chart", "run", "table", "warnings"]

_CHECK_SECONDS = 120.0
_IDLE_SECONDS = 2.0  # less than any server keeps a connection: none is closed under a request
_SHOWN = 300
_JPEG_QUALITY = 90
_OK = 200


def run(settings: ServeBenchmark, progress: ProgressBar = silent) -> Result:
    """What `measure` says, as every benchmark hands it back."""
    figures = measure(settings, progress)
    columns, rows = table(figures)
    return Result(
        benchmark="serve",
        environment=environment(resolve_platform("cpu")),  # of the client; the endpoint may be anywhere
        settings=figures["settings"],
        figures={"rates": figures["rates"]},
        tables=[Table(f"Load on {settings.base_url}", tuple(columns), [tuple(row) for row in rows])],
        chart=lambda path: chart(figures, path),
        notes=warnings(figures),
    )


def measure(settings: ServeBenchmark, progress: ProgressBar = silent) -> dict[str, Any]:
    """{"settings": …, "rates": [one per rate]}, seconds and tokens. Raises ParameterError.

    Latencies count from the moment at which a request was due: what waits for the cap or for a slow client
    has waited. Errors are counted, and in no percentile.
    """
    try:
        import httpx  # noqa: F401
    except ImportError:
        raise ParameterError("wemm bench serve needs httpx: pip install 'wemm[bench]'") from None
    return asyncio.run(_run(settings, progress))


async def _run(settings: ServeBenchmark, progress: ProgressBar) -> dict[str, Any]:
    async with _client(settings) as client:
        settings = replace(settings, model=settings.model or await _first_model(client, settings))
        await _check(client, settings)
        rates = [
            await _measure(client, settings, index, rate, progress) for index, rate in enumerate(settings.rates)
        ]
    shown = {item.name: getattr(settings, item.name) for item in fields(settings) if item.name != "api_key"}
    return {"settings": shown, "rates": rates}


def _client(settings: ServeBenchmark) -> httpx.AsyncClient:
    import httpx

    key = settings.api_key or os.environ.get("OPENAI_API_KEY")
    headers = {
        "Accept-Encoding": "identity",
        "Content-Type": "application/json",
        "User-Agent": f"wemm/{wemm.__version__}",
    }
    if key and not (key.isascii() and key.isprintable()):
        raise ParameterError("the API key has characters that no HTTP header takes; correct --api-key")
    if key:
        headers["Authorization"] = f"Bearer {key}"
    return httpx.AsyncClient(
        headers=headers,
        verify=ssl.create_default_context(),
        trust_env=False,  # a proxy would be measured too
        timeout=None,
        limits=httpx.Limits(keepalive_expiry=_IDLE_SECONDS),  # and as many connections as requests
    )


async def _measure(
    client: httpx.AsyncClient, settings: ServeBenchmark, index: int, rate: float, progress: ProgressBar
) -> dict[str, Any]:
    bodies = _bodies(settings, settings.workload(index))
    rng = np.random.default_rng(settings.workload_seed + index)
    times = departures(rate, settings.requests, settings.burstiness, rng)
    with progress(f"{rate:g} requests per second", len(bodies), "answers") as advance:
        exchanges = await offer(
            client, _url(settings), bodies, times, settings.timeout, settings.max_concurrency, lambda: advance(1)
        )
    level = ServiceLevel(settings.slo_first_token, settings.slo_inter_token)
    return figures(rate, exchanges, level)


def _url(settings: ServeBenchmark) -> str:
    return f"{settings.base_url.rstrip('/')}/chat/completions"


def _bodies(settings: ServeBenchmark, workload: Workload) -> list[bytes]:
    """Of all requests, before the first leaves."""
    urls: dict[int, str] = {}

    def part(part: Mapping[str, Any]) -> Mapping[str, Any]:
        if part["type"] != "image":
            return part
        image = part["image"]
        if id(image) not in urls:
            urls[id(image)] = _data_url(image)
        return {"type": "image_url", "image_url": {"url": urls[id(image)]}}

    return [
        _body(settings, [{"role": "user", "content": [part(each) for each in message["content"]]}])
        for [message] in workload.conversations()
    ]


def _data_url(image: Any) -> str:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=_JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _body(settings: ServeBenchmark, messages: list[dict[str, Any]]) -> bytes:
    body = {
        "model": settings.model,
        "messages": messages,
        "max_tokens": settings.output_len,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if settings.ignore_eos:
        body |= {"ignore_eos": True, "repetition_guard": False}
    return json.dumps(body).encode()


async def _first_model(client: httpx.AsyncClient, settings: ServeBenchmark) -> str:
    import httpx

    url = f"{settings.base_url.rstrip('/')}/models"
    try:
        response = await client.get(url, timeout=_CHECK_SECONDS)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise _unreachable(url, error) from None
    if response.status_code != _OK:
        raise _refused(url, response.status_code, response.content)
    try:
        return str(response.json()["data"][0]["id"])
    except (ValueError, LookupError, TypeError):
        raise ParameterError(f"{url} lists no model: {_words(response.content)}; name one with --model") from None


async def _check(client: httpx.AsyncClient, settings: ServeBenchmark) -> None:
    """One request of its own, so that a mistake is told before the load, and the endpoint is warm."""
    url = _url(settings)
    workload = replace(settings.workload(len(settings.rates)), num_requests=1, num_images=1)
    [exchange] = await offer(
        client, url, _bodies(settings, workload), [0.0], min(_CHECK_SECONDS, settings.timeout)
    )
    if exchange.failure:
        raise _unreachable(url, exchange.failure)
    if exchange.status != _OK:
        raise _refused(url, exchange.status or 0, exchange.body)
    if error := read_answer(exchange).error:
        raise ParameterError(
            f"{url} does not stream chat completions ({error}): {_words(exchange.body)}; correct --base-url"
        )


def _unreachable(url: str, error: object) -> ParameterError:
    return ParameterError(f"no answer from {url} ({error}); start the server there, or correct --base-url")


def _refused(url: str, status: int, body: bytes) -> ParameterError:
    remedies = {
        401: "give its key with --api-key or OPENAI_API_KEY",
        403: "give a key that may call it with --api-key or OPENAI_API_KEY",
        404: "correct --model, or --base-url (which ends in /v1)",
        413: "take a smaller --image-size",
        **dict.fromkeys(
            (400, 422), "correct --model, --image-size or --output-len; for strict endpoints --no-ignore-eos"
        ),
    }
    remedy = remedies.get(status, "try again when the endpoint is well")
    return ParameterError(f"{url} refused a first request with {status}: {_words(body)}; {remedy}")


def _words(body: bytes) -> str:
    """What a refusal says, on one line."""
    text = body.decode(errors="replace")
    with suppress(ValueError, LookupError, TypeError):
        text = str(json.loads(text)["error"]["message"])
    return " ".join(text.split())[:_SHOWN] or "without a word"
