"""The application: routes, middleware, health. Nothing is decided here."""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp, Scope

import wemm
from wemm.errors import WemmError
from wemm.server import mindie, openai
from wemm.server.auth import Authentication
from wemm.server.body import BodyLimit
from wemm.server.context import RequestContexts
from wemm.server.errors import Refusal, refusal
from wemm.server.hosts import HostGuard
from wemm.server.metrics import CONTENT_TYPE
from wemm.server.routing import parameter_error
from wemm.server.service import Service

OPEN_PATHS = frozenset({"/health", "/ready"})
"""Asked by what watches the service: no key, and nothing to learn there."""
_METRICS = "/metrics"


def make_app(service: Service, api_keys: tuple[str, ...]) -> ASGIApp:
    """The business plane: OpenAI and MindIE routes, health, metrics."""
    app = _bare_app("WeMM", service)
    app.include_router(openai.router(service))
    app.include_router(mindie.router(service))
    _add_health(app, service)
    _add_metrics(app, service)
    return _guarded(app, service, api_keys, lambda path: path == _METRICS)


def make_management_app(service: Service, api_keys: tuple[str, ...], stop: Callable[[bool], None]) -> ASGIApp:
    """The management plane: MindIE's routes for operators. `stop(force)` ends the service."""
    app = _bare_app("WeMM management", service)
    app.include_router(mindie.management_router(service, stop))
    _add_metrics(app, service)
    return _guarded(app, service, api_keys, lambda path: True)


def make_metrics_app(service: Service, api_keys: tuple[str, ...]) -> ASGIApp:
    """The metrics plane: one page."""
    app = _bare_app("WeMM metrics", service)
    _add_metrics(app, service)
    return _guarded(app, service, api_keys, lambda path: True)


def _bare_app(title: str, service: Service) -> FastAPI:
    app = FastAPI(title=title, version=wemm.__version__, docs_url=None, redoc_url=None)

    async def refuse(request: Request, error: Exception) -> Response:
        service.note(error)
        return _worded(request.scope, refusal(error))

    async def refuse_body(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return await refuse(request, parameter_error(error))

    async def refuse_route(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        kind = "not_found" if error.status_code == HTTPStatus.NOT_FOUND else "invalid_request"
        message = f"{error.detail}: {request.method} {request.url.path[:100]}"
        return _worded(request.scope, Refusal(error.status_code, kind, message), error.headers)

    app.add_exception_handler(RequestValidationError, refuse_body)
    app.add_exception_handler(HTTPException, refuse_route)
    app.add_exception_handler(WemmError, refuse)
    app.add_exception_handler(Exception, refuse)
    return app


def _add_health(app: FastAPI, service: Service) -> None:
    @app.get("/health", summary="The process answers", tags=["Operations"])
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get(
        "/ready",
        summary="Requests will be answered",
        tags=["Operations"],
        responses={503: {"description": "The model is loading, warming up, dead or the service is stopping"}},
    )
    async def ready() -> Response:
        if service.is_ready:
            return JSONResponse({"status": "ready"})
        why = "the service is stopping" if service.draining else service.supervisor.why_not_ready
        return JSONResponse({"status": "not ready", "reason": why}, HTTPStatus.SERVICE_UNAVAILABLE)


def _add_metrics(app: FastAPI, service: Service) -> None:
    @app.get(_METRICS, response_class=PlainTextResponse, summary="Prometheus metrics", tags=["Operations"])
    async def metrics() -> Response:
        return Response(service.metrics.page(), headers={"Content-Type": CONTENT_TYPE})


def _guarded(
    app: ASGIApp, service: Service, api_keys: tuple[str, ...], is_admin: Callable[[str], bool]
) -> ASGIApp:
    """From the inside out: body, key, host, context."""
    config = service.config

    def reject(scope: Scope, status: int, message: str, code: str) -> ASGIApp:
        service.metrics.failed(code)
        retry_after = 1 if status == HTTPStatus.TOO_MANY_REQUESTS else None
        return _worded(scope, Refusal(status, code, message, retry_after=retry_after))

    app = BodyLimit(app, config.max_body_size, reject=reject, hold=service.admission.hold)
    app = Authentication(app, api_keys, config.admin_key, OPEN_PATHS, is_admin, reject)
    app = HostGuard(app, config.host, config.allowed_host, config.allowed_origin, reject)
    return RequestContexts(app, service.metrics)


def _worded(scope: Scope, problem: Refusal, headers: Any = None) -> Response:
    dialect = mindie if mindie.is_mindie_path(scope["path"]) else openai
    response: Response = dialect.error_response(problem)
    response.headers.update(headers or {})
    return response
