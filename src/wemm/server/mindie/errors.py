"""Errors in MindIE's words: its statuses, its types, its paths."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from starlette.responses import JSONResponse, Response

from wemm.server.errors import Refusal

VALIDATION = HTTPStatus.UNPROCESSABLE_ENTITY
_GENERATION = HTTPStatus.FAILED_DEPENDENCY
_TYPES: dict[int, str] = {
    HTTPStatus.BAD_REQUEST: "Bad Request",
    HTTPStatus.NOT_FOUND: "NotFoundError",
    VALIDATION: "Input Validation Error",
    _GENERATION: "Generation Error",
    HTTPStatus.INTERNAL_SERVER_ERROR: "Incomplete Generation",
    HTTPStatus.SERVICE_UNAVAILABLE: "Service Unavailable",
}
_STATUSES: dict[str, int] = {
    "model_not_found": VALIDATION,
    "timeout": HTTPStatus.INTERNAL_SERVER_ERROR,
    "engine_error": _GENERATION,
}
_FORMS: dict[str, str] = {
    "timeout": "Engine callback timeout: {}",
    "internal_error": "Server internal error: {}",
}
_PATHS = frozenset(
    (
        "/", "/generate", "/generate_stream", "/infer", "/infer_token", "/v1/tokenizer", "/dresult", "/v2",
        "/info", "/metrics-json", "/stopService", "/v1/config", "/v1/status", "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
    )
)  # fmt: skip
_BELOW = ("/v2/", "/v1/role/", "/v1/engine-server/", "/health/timed")


def is_mindie_path(path: str) -> bool:
    """Whether errors of this path are MindIE's, be there such a route or not."""
    return path in _PATHS or path.startswith(_BELOW)


def mindie_status(problem: Refusal) -> int:
    """422 for whatever is wrong with a body."""
    status = _STATUSES.get(problem.kind, problem.status)
    return VALIDATION if status == HTTPStatus.BAD_REQUEST else status


def error_body(problem: Refusal) -> dict[str, Any]:
    """MindIE's shape of an error."""
    status = mindie_status(problem)
    message = _FORMS.get(problem.kind, "{}").format(problem.message)
    if status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
        # The one error that MindIE words with another key.
        message = f"Request body too large: {message}"
        return {"message": message, "error": message, "error_type": HTTPStatus(status).phrase}
    return {"error": message, "error_type": _TYPES.get(status) or HTTPStatus(status).phrase}


def error_response(problem: Refusal) -> Response:
    """The same as a response."""
    return JSONResponse(error_body(problem), mindie_status(problem), problem.headers)


def bad_request(message: str) -> Response:
    """What MindIE says to a request that has no place in how the service runs."""
    status = HTTPStatus.BAD_REQUEST
    return JSONResponse({"error": message, "error_type": _TYPES[status]}, status)


def not_found(message: str) -> Response:
    """There is no such thing here."""
    return error_response(Refusal(HTTPStatus.NOT_FOUND, "not_found", message))
