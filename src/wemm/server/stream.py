"""Server-sent events: lines, signs of life while nothing happens, an end that says what went wrong."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing, suppress
from typing import Any

from starlette.responses import StreamingResponse

from wemm.server.service import Service

_KEEP_ALIVE_SECONDS = 15.0
_KEEP_ALIVE = ": keep-alive\n\n"
NOT_STORED = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
"""Headers of every stream."""
DONE = "data: [DONE]\n\n"
_MEDIA_TYPE = "text/event-stream"
_ONE_EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
EVENTS: dict[int | str, dict[str, Any]] = {
    200: {"description": "Server-sent events", "content": {_MEDIA_TYPE: {"schema": _ONE_EVENT}}}
}
"""What a route documents that streams, always or if it is asked to."""


def event(data: Any) -> str:
    """One event with a JSON body."""
    return f"data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


class EventStream(StreamingResponse):
    """Events of an iterator that may fail in the middle."""

    media_type = _MEDIA_TYPE

    def __init__(
        self,
        events: AsyncGenerator[str, None],
        service: Service,
        describe: Callable[[Exception], Mapping[str, Any]],
        end: str = "",
    ) -> None:
        """`describe` makes the body of an event of whatever failed; `end` is sent last in any case."""
        super().__init__(
            _alive(until_failure(events, service, lambda error: event(describe(error)), end)), headers=NOT_STORED
        )


async def until_failure(
    pieces: AsyncGenerator[str, None], service: Service, last_words: Callable[[Exception], str], end: str = ""
) -> AsyncGenerator[str, None]:
    """The same pieces; where they fail, a last one that says why, for the status is sent by then."""
    try:
        async with aclosing(pieces):
            async for piece in pieces:
                yield piece
    except Exception as error:  # noqa: BLE001 - whatever it is, the client must hear of it
        service.note(error)
        yield last_words(error)
    if end:
        yield end


async def _alive(lines: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    """The same lines, and a comment wherever none came for a while: proxies cut what is silent."""
    following = asyncio.ensure_future(anext(lines))
    try:
        while True:
            done, _ = await asyncio.wait({following}, timeout=_KEEP_ALIVE_SECONDS)
            if not done:
                yield _KEEP_ALIVE
                continue
            try:
                line = following.result()
            except StopAsyncIteration:
                return
            yield line
            following = asyncio.ensure_future(anext(lines))
    finally:
        following.cancel()
        with suppress(BaseException):
            await following
        await lines.aclose()
