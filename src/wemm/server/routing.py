"""FastAPI routes whose bodies are parsed strictly, and where in a body an error lies."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.responses import Response

from wemm.errors import ParameterError

_MAX_SHOWN = 100
_LARGE = 2**18  # bytes, worth a thread


class StrictRoute(APIRoute):
    """A route that reads JSON as body.py parses it, whatever type a body claims to be (curl -d says: a form)."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """As FastAPI asks for it."""
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            if request.method == "POST":
                # Here and not where FastAPI asks: it would hide what is wrong with a body.
                body, parse = await request.body(), request.scope["state"]["parse_json"]
                given = parse(body) if len(body) < _LARGE else await asyncio.to_thread(parse, body)
                request = Request({**request.scope, "headers": _as_json(request)}, request.receive)
                request._json = given
                request._body = b"parsed"  # to keep megabytes of base64 once, not twice
                del body, given
            return await handle(request)

        return handle_strictly


def _as_json(request: Request) -> list[tuple[bytes, bytes]]:
    others = [(name, value) for name, value in request.scope["headers"] if name != b"content-type"]
    return [*others, (b"content-type", b"application/json")]


def parameter_error(error: RequestValidationError) -> ParameterError:
    """The innermost problem of a body, with its place: `messages[0].content[1].image_url`."""
    # Of a union, every member complains; the one that was meant came furthest.
    problem = max(error.errors(), key=lambda problem: len(problem["loc"]))
    param = place(problem["loc"], error.body)
    given = problem.get("input")
    shown = repr(given)
    shown = shown if len(shown) <= _MAX_SHOWN else f"{shown[:_MAX_SHOWN]}…"
    missing = problem["type"] == "missing"
    message = f"{param or 'the body'}: {problem['msg']}" + ("" if missing else f". Given: {shown}")
    return ParameterError(message, param or None)


def place(location: Sequence[str | int], body: Any) -> str:
    """pydantic's location without what is not of the body itself: the names of union members."""
    path, value = "", body
    for i, step in enumerate(location):
        if i == 0 and step == "body":
            continue
        if isinstance(step, int) and isinstance(value, list):
            path += f"[{step}]"
            value = value[step] if 0 <= step < len(value) else None
        elif isinstance(step, str) and isinstance(value, dict) and (step in value or i == len(location) - 1):
            path += f".{step}" if path else step
            value = value.get(step)
    return path
