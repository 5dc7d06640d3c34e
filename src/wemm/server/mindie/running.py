"""Requests that their callers may stop by id."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from wemm.errors import ParameterError
from wemm.request import CompletionOutput, RequestOutput
from wemm.server.service import Generation

STOPPED = "stopInfer"
"""The stop reason of an answer that was stopped."""


class RunningRequests:
    """Who can be stopped: ids are those of one caller, and free again when the request has ended."""

    def __init__(self) -> None:
        self._stops: dict[tuple[str, str], asyncio.Event] = {}

    @contextmanager
    def enter(self, caller: str, request_id: str) -> Iterator[asyncio.Event]:
        """A request runs; the event comes if it is to stop. Raises ParameterError if the id is taken."""
        key = caller, request_id
        if key in self._stops:
            raise ParameterError(f"id {request_id!r} is taken by a request that has not ended yet", "id")
        stop = self._stops[key] = asyncio.Event()
        try:
            yield stop
        finally:
            del self._stops[key]

    def stop(self, caller: str, request_id: str) -> bool:
        """False if no such request runs."""
        stop = self._stops.get((caller, request_id))
        if stop is not None:
            stop.set()
        return stop is not None


async def until_stopped(generation: Generation, stop: asyncio.Event) -> AsyncGenerator[RequestOutput, None]:
    """Deltas; if `stop` comes before the end, the last one says so and the engine is let go."""
    outputs = generation.deltas()
    stopping = asyncio.ensure_future(stop.wait())
    following: asyncio.Future[RequestOutput] = asyncio.ensure_future(anext(outputs))
    last: RequestOutput | None = None
    try:
        while True:
            awaited: list[asyncio.Future[Any]] = [following, stopping]
            await asyncio.wait(awaited, return_when=asyncio.FIRST_COMPLETED)
            if not following.done():
                yield _stopped(generation, last)
                return
            try:
                last = following.result()
            except StopAsyncIteration:
                return
            yield last
            following = asyncio.ensure_future(anext(outputs))
    finally:
        for future in (following, stopping):
            future.cancel()
        await asyncio.gather(following, stopping, return_exceptions=True)
        await outputs.aclose()


def _stopped(generation: Generation, last: RequestOutput | None) -> RequestOutput:
    if last is None:
        wanted = generation.params.logprobs is not None
        nothing = CompletionOutput(0, "", (), None, () if wanted else None, None)
        answers = tuple(replace(nothing, index=i) for i in range(generation.params.n))
        last = RequestOutput(generation.request_id, generation.prompt_token_ids, answers, finished=True)
    return replace(last, finished=True, outputs=tuple(map(_ended, last.outputs)))


def _ended(answer: CompletionOutput) -> CompletionOutput:
    nothing = None if answer.logprobs is None else ()
    return replace(answer, text="", token_ids=(), logprobs=nothing, finish_reason="stop", stop_reason=STOPPED)
