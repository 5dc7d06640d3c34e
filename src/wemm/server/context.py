"""What belongs to one HTTP request: its id, its caller, its log line, and everything that must end with it."""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid
from collections.abc import MutableMapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from wemm.server.metrics import Metrics

_access = logging.getLogger("wemm.access")
_GOOD_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
_MAX_LOGGED = 100


@dataclass
class RequestContext:
    """Lives as long as the HTTP request."""

    request_id: str
    state: MutableMapping[str, Any]
    """What the other layers of middleware found out."""
    stage: str = "upload"
    """What is being done for it: upload, fetch, prepare, generate."""
    resources: AsyncExitStack = field(default_factory=AsyncExitStack)
    """What is given back when the request ends, however it ends."""
    figures: dict[str, float | int | str] = field(default_factory=dict)
    """For the log: numbers, never content."""

    @property
    def caller(self) -> str:
        """Who asks, as far as keys tell; caches are apart between callers."""
        return str(self.state.get("caller", ""))

    def hold(self, num_bytes: int) -> None:
        """Make room for what its body becomes. Raises OverloadedError."""
        self.state["hold"](num_bytes)

    @property
    def client_left(self) -> bool:
        """Whether nobody waits for the answer any more."""
        return bool(self.state.get("client_left"))


def context_of(scope: MutableMapping[str, Any]) -> RequestContext:
    """The context of the request that a route answers."""
    context: RequestContext = scope["state"]["context"]
    return context


class RequestContexts:
    """ASGI middleware, the outermost."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Give the request a context; log it when it is over."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        state = scope.setdefault("state", {})
        context = RequestContext(given if _GOOD_ID.fullmatch(given) else uuid.uuid4().hex, state)
        state["context"] = context
        started, status = time.monotonic(), 0
        names = [(name, context.request_id.encode()) for name in (b"x-request-id", b"requestuuid")]

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), *names]}
            await send(message)

        outcome = "failed"
        try:
            await self._app(scope, receive, send_with_id)
            outcome = "ok"
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        except Exception:
            if not status:
                raise  # nothing was answered, and nobody has written it down
        finally:
            if context.client_left:
                outcome = "client left"
                self._metrics.cancelled(context.stage)
            await asyncio.shield(context.resources.aclose())
            fields = {
                "request_id": context.request_id,
                "method": scope["method"],
                "path": scope["path"][:_MAX_LOGGED],
                "status": status,
                "outcome": outcome,
                "stage": context.stage,
                "seconds": round(time.monotonic() - started, 4),
                "caller": context.caller,
                **context.figures,
            }
            _access.info("request", extra={"fields": fields})
