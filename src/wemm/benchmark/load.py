"""Open-loop load over HTTP: requests leave at their times, however many answers are still to come.

While requests are under way the client only notes when bytes arrive; what they say is read afterwards.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import httpx

_LEAD_SECONDS = 0.05
_OK = 200


@dataclass
class Exchange:
    """One request as the client saw it. Moments are seconds of one clock (`time.perf_counter`)."""

    due: float
    """When it was to leave."""
    woken: float = 0.0
    """When the client turned to it."""
    admitted: float = 0.0
    """When the cap on concurrency let it go."""
    sent: float | None = None
    """When httpx began to connect or to write."""
    ended: float = 0.0
    status: int | None = None
    failure: str | None = None
    """timeout, unreachable or dropped: there is no whole answer."""
    chunks: list[tuple[float, bytes]] = field(default_factory=list)
    """What arrived, and when."""

    @property
    def lateness(self) -> float:
        """Seconds the client itself lost."""
        sent = self.admitted if self.sent is None else self.sent
        return (self.woken - self.due) + (sent - self.admitted)

    @property
    def queue(self) -> float:
        """Seconds it waited for the cap."""
        return self.admitted - self.woken

    @property
    def body(self) -> bytes:
        """All that arrived."""
        return b"".join(chunk for _, chunk in self.chunks)


@dataclass(frozen=True)
class Answer:
    """What the events of one stream said."""

    token_times: tuple[float, ...] = ()
    """When each event that carries tokens arrived."""
    num_output_tokens: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    error: str | None = None
    """Why it is no answer: a status, what befell the connection, or what is wrong with the stream."""


def departures(rate: float, num_requests: int, burstiness: float, rng: np.random.Generator) -> list[float]:
    """Seconds from the start, ascending, the first 0: gaps from a gamma distribution of mean 1 / rate.

    `burstiness` is its shape: 1 is a Poisson process, less comes in bursts, more is more even.
    """
    if np.isinf(rate):
        return [0.0] * num_requests
    gaps = rng.gamma(burstiness, 1 / (rate * burstiness), num_requests)
    return [float(moment) for moment in np.cumsum(gaps) - gaps[0]]


async def offer(
    client: httpx.AsyncClient,
    url: str,
    bodies: Sequence[bytes],
    times: Sequence[float],
    timeout: float,
    max_concurrency: int | None = None,
    on_end: Callable[[], None] = lambda: None,
) -> list[Exchange]:
    """Post each body at its time. Failures are noted in the exchange, never raised."""
    gate = asyncio.Semaphore(max_concurrency) if max_concurrency else nullcontext()

    async def exchange(body: bytes, due: float) -> Exchange:
        record = Exchange(due, woken=time.perf_counter())
        async with gate:
            record.admitted = time.perf_counter() if max_concurrency else record.woken
            await _post(client, url, body, timeout, record)
        on_end()
        return record

    tasks = []
    start = time.perf_counter() + _LEAD_SECONDS
    try:
        for body, after in zip(bodies, times, strict=True):
            await asyncio.sleep(start + after - time.perf_counter())
            tasks.append(asyncio.ensure_future(exchange(body, start + after)))
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def _post(client: httpx.AsyncClient, url: str, body: bytes, timeout: float, record: Exchange) -> None:
    import httpx

    try:
        await asyncio.wait_for(_stream(client, url, body, record), timeout)
    except asyncio.TimeoutError:
        record.failure = "timeout"
    except httpx.ConnectError:
        record.failure = "unreachable"
    except httpx.HTTPError:
        record.failure = "dropped"
    record.ended = time.perf_counter()


async def _stream(client: httpx.AsyncClient, url: str, body: bytes, record: Exchange) -> None:
    async def note(event: str, info: dict[str, Any]) -> None:
        if record.sent is None:
            record.sent = time.perf_counter()

    async with client.stream("POST", url, content=body, extensions={"trace": note}) as response:
        record.status = response.status_code
        async for chunk in response.aiter_raw():
            record.chunks.append((time.perf_counter(), chunk))


def read_answer(exchange: Exchange) -> Answer:
    """The figures of a stream of chat completion chunks."""
    if exchange.failure:
        return Answer(error=exchange.failure)
    if exchange.status != _OK:
        return Answer(error=str(exchange.status))
    try:
        return _read(list(_events(exchange.chunks)))
    except (ValueError, TypeError, AttributeError):
        return Answer(error="not a stream of chat completion chunks")


def _read(events: list[tuple[float, str]]) -> Answer:
    times: list[float] = []
    usage: dict[str, Any] = {}
    is_whole = False
    for moment, text in events:
        if text == "[DONE]":
            is_whole = True
            continue
        data = json.loads(text)
        if data.get("error"):
            return Answer(error="error in the stream")
        usage = data.get("usage") or usage
        for choice in data.get("choices") or ():
            is_whole = is_whole or bool(choice.get("finish_reason"))
            if _has_tokens(choice.get("delta") or {}):
                times.append(moment)
    if not is_whole:
        return Answer(error="dropped")
    if not times:
        return Answer(error="no token")
    details = usage.get("prompt_tokens_details") or {}
    return Answer(
        token_times=tuple(times),
        num_output_tokens=usage.get("completion_tokens") or len(times),
        num_prompt_tokens=usage.get("prompt_tokens") or 0,
        num_cached_tokens=details.get("cached_tokens") or 0,
    )


def _has_tokens(delta: dict[str, Any]) -> bool:
    """A token may have no text of its own; the event that only names the role carries none."""
    text = delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning")
    return bool(text) or ("role" not in delta and delta.get("content") == "")


def _events(chunks: Sequence[tuple[float, bytes]]) -> Iterator[tuple[float, str]]:
    """(when its last byte arrived, data) of every server-sent event."""
    rest = b""
    for moment, chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield moment, line[5:].strip().decode()
