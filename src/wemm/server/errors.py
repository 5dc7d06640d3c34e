"""What went wrong → an HTTP status and a kind, the same for all dialects; each dialect words its own body."""

from __future__ import annotations

from dataclasses import dataclass
from http import HTTPStatus

from wemm.errors import (
    ClientError,
    EngineDeadError,
    MediaError,
    PromptTooLongError,
    RequestTimeoutError,
    StructuredOutputError,
    WemmError,
)
from wemm.server.admission import OverloadedError

_RETRY_DEAD_ENGINE = 10


class UnknownModelError(ClientError):
    """The request names a model that is not served here."""


@dataclass(frozen=True)
class Refusal:
    """Why a request got no answer."""

    status: int
    kind: str
    message: str
    param: str | None = None
    retry_after: int | None = None
    """Seconds after which the same request is worth another try."""

    @property
    def headers(self) -> dict[str, str]:
        """Of the response."""
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}


def refusal(error: Exception) -> Refusal:
    """Status and kind of whatever a route raised."""
    message = str(error)
    if isinstance(error, OverloadedError):
        return Refusal(HTTPStatus.TOO_MANY_REQUESTS, "overloaded", message, retry_after=error.retry_after)
    if isinstance(error, EngineDeadError):
        return Refusal(HTTPStatus.SERVICE_UNAVAILABLE, "unavailable", message, retry_after=_RETRY_DEAD_ENGINE)
    if isinstance(error, RequestTimeoutError):
        return Refusal(HTTPStatus.GATEWAY_TIMEOUT, "timeout", message)
    if isinstance(error, UnknownModelError):
        return Refusal(HTTPStatus.NOT_FOUND, "model_not_found", message, "model")
    if isinstance(error, PromptTooLongError):
        return Refusal(HTTPStatus.BAD_REQUEST, "context_length_exceeded", message, error.param or "messages")
    if isinstance(error, MediaError):
        return Refusal(HTTPStatus.BAD_REQUEST, "invalid_image", message, error.param)
    if isinstance(error, ClientError):
        return Refusal(HTTPStatus.BAD_REQUEST, "invalid_request", message, error.param)
    if isinstance(error, StructuredOutputError):
        # Too large to follow, which shows in the middle of an answer.
        return Refusal(HTTPStatus.BAD_REQUEST, "invalid_request", message, "structured_outputs")
    if isinstance(error, WemmError):
        return Refusal(HTTPStatus.INTERNAL_SERVER_ERROR, "engine_error", message)
    # Whatever it says was not written for strangers.
    return Refusal(
        HTTPStatus.INTERNAL_SERVER_ERROR, "internal_error", "the service failed; its log has the reason"
    )
