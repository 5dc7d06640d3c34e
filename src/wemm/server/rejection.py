"""How the edge of the service words a refusal. Each dialect brings its own words; here is what they replace."""

from __future__ import annotations

from collections.abc import Callable

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Scope

Reject = Callable[[Scope, int, str, str], ASGIApp]
"""(scope, HTTP status, message, code) → the response, an ASGI application."""


def reject_plainly(scope: Scope, status: int, message: str, code: str) -> ASGIApp:
    """A refusal in no dialect."""
    return JSONResponse({"error": {"message": message, "code": code}}, status)
