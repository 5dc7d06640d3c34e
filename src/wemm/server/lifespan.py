"""Startup and shutdown of an ASGI application."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any

from starlette.types import ASGIApp, Message

from wemm.errors import EngineError

_HURRY_SECONDS = 3.0
"""What the application may take to end when there is no time."""


async def done_before(event: asyncio.Event, work: Awaitable[Any]) -> bool:
    """Whether the work was done before the event came; if not it is cancelled."""
    waiting, working = asyncio.ensure_future(event.wait()), asyncio.ensure_future(work)
    try:
        await asyncio.wait({waiting, working}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
        return working.done()
    finally:
        waiting.cancel()
        working.cancel()


class Lifespan:
    """The ASGI lifespan of one application. Unlike uvicorn's it passes on what the application raises."""

    def __init__(self, app: ASGIApp) -> None:
        self.state: dict[str, Any] = {}
        self._app = app
        self._task: asyncio.Future[None] | None = None
        self._orders: asyncio.Queue[Message] = asyncio.Queue()
        self._complete: set[str] = set()
        self._changed = asyncio.Event()

    async def startup(self) -> None:
        """Raises what the application raises."""
        scope = {"type": "lifespan", "asgi": {"version": "3.0", "spec_version": "2.0"}, "state": self.state}
        self._task = asyncio.ensure_future(self._run(scope))
        await self._order("lifespan.startup")

    async def shutdown(self, hurry: asyncio.Event) -> None:
        """Let the application end. Once `hurry` is set it has little time for it."""
        if self._task is None or self._task.done():
            return
        if "lifespan.startup.complete" not in self._complete:
            self._task.cancel()
            await asyncio.wait({self._task}, timeout=_HURRY_SECONDS)
            return
        ending = asyncio.ensure_future(self._order("lifespan.shutdown"))
        if not await done_before(hurry, asyncio.wait({ending})):
            await asyncio.wait({ending}, timeout=_HURRY_SECONDS)
        if ending.done():
            ending.result()
        else:
            ending.cancel()
            self._task.cancel()

    async def _run(self, scope: dict[str, Any]) -> None:
        try:
            await self._app(scope, self._orders.get, self._send)
        finally:
            self._changed.set()

    async def _send(self, message: Message) -> None:
        self._complete.add(message["type"])
        self._changed.set()

    async def _order(self, phase: str) -> None:
        assert self._task is not None
        self._changed.clear()
        self._orders.put_nowait({"type": phase})
        await self._changed.wait()
        if f"{phase}.complete" not in self._complete:
            await self._task
            raise EngineError(f"the application ended in {phase}")
