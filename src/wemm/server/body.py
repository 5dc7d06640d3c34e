"""Bodies of requests: how much may come in what time, what ends when the client leaves, what counts as JSON."""

from __future__ import annotations

import asyncio
import ctypes
import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from http import HTTPStatus
from itertools import accumulate
from typing import Any

import pydantic_core
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from wemm.errors import ClientError
from wemm.server.admission import Hold, OverloadedError
from wemm.server.rejection import Reject, reject_plainly

MAX_DEPTH = 32
MAX_JSON_ITEMS = 200_000

_STRUCTURE = b'[]{},"'
_NOT_STRUCTURE = bytes(byte for byte in range(256) if byte not in _STRUCTURE)
_STRINGS = re.compile(rb'"[^"]*"')
_DEPTH_CHANGE = [(byte in b"[{") - (byte in b"]}") for byte in range(256)]
_LEAST_INTEGER, _MOST_INTEGER = -(2**63), 2**64 - 1
_MAX_SHOWN = 100
_LARGE = 2**20
_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
"""glibc gives what was freed back to the system; by itself it keeps most of what a large body took."""


@contextmanager
def unbounded() -> Iterator[Hold]:
    """No bound on all bodies together."""
    yield lambda num_bytes: None


class InvalidJsonError(ClientError):
    """A body that is not the JSON it ought to be."""


class _TooLargeError(Exception):
    pass


class _DisconnectedError(Exception):
    pass


class BodyLimit:
    """ASGI middleware: the application gets bodies whole or not at all, and is cancelled when its client leaves.

    A body is refused by its declared length before it is read, or when more or slower arrives than allowed.
    In `scope["state"]` stand `parse_json`, with the limits given here, `hold`, for what the body becomes, and, if
    it was so, `client_left`: True.
    """

    def __init__(
        self,
        app: ASGIApp,
        max_body_size: int,
        body_timeout: float = 60.0,
        max_depth: int = MAX_DEPTH,
        max_json_items: int = MAX_JSON_ITEMS,
        reject: Reject = reject_plainly,
        hold: Callable[[], AbstractContextManager[Hold]] = unbounded,
    ) -> None:
        """`hold` makes room for what arrives, until the request is over."""
        self._app = app
        self._hold = hold
        self._max_body_size = max_body_size
        self._body_timeout = body_timeout
        self._parse_json = partial(parse_json, max_depth=max_depth, max_json_items=max_json_items)
        self._reject = reject

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Read the body, then let the application run as long as the client stays."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        with self._hold() as hold:
            await self._pass_on(scope, receive, send, hold)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send, hold: Hold) -> None:
        try:
            self._check_size(_declared_length(scope))
            # Nobody but the application may hold the body on while it answers.
            messages = [await asyncio.wait_for(self._read(receive, hold), self._body_timeout)]
        except _DisconnectedError:
            scope.setdefault("state", {})["client_left"] = True
            return
        except _TooLargeError as error:
            message = f"the body has {error} bytes; at most {self._max_body_size} are read"
            answer = self._reject(scope, HTTPStatus.REQUEST_ENTITY_TOO_LARGE, message, "request_too_large")
            await answer(scope, receive, send)
            return
        except OverloadedError as error:
            answer = self._reject(scope, HTTPStatus.TOO_MANY_REQUESTS, str(error), "overloaded")
            await answer(scope, receive, send)
            return
        except asyncio.TimeoutError:
            message = f"the body did not arrive within {self._body_timeout:g} s"
            answer = self._reject(scope, HTTPStatus.REQUEST_TIMEOUT, message, "request_timeout")
            await answer(scope, receive, send)
            return
        scope.setdefault("state", {}).update(parse_json=self._parse_json, hold=hold)
        is_large = len(messages[0]["body"]) > _LARGE
        await _run_while_connected(self._app, scope, messages, receive, send)
        if is_large and _trim is not None:
            await asyncio.to_thread(_trim, 0)

    def _check_size(self, size: int, suffix: str = "") -> None:
        if size > self._max_body_size:
            raise _TooLargeError(f"{size}{suffix}")

    async def _read(self, receive: Receive, hold: Hold) -> Message:
        # One growing buffer: a list of the pieces of a body sent byte by byte would take many times its size.
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _DisconnectedError
            piece = message.get("body", b"")
            self._check_size(len(body) + len(piece), " or more")
            hold(len(piece))
            body += piece
            if not message.get("more_body", False):
                return {"type": "http.request", "body": bytes(body), "more_body": False}


def _declared_length(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length":
            return int(value)  # digits: HTTP's parser has seen to it
    return 0


async def _run_while_connected(
    app: ASGIApp, scope: Scope, messages: list[Message], receive: Receive, send: Send
) -> None:
    left = asyncio.Event()
    is_answered = False

    async def receive_body() -> Message:
        if messages:
            return messages.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def send_noting_the_end(message: Message) -> None:
        nonlocal is_answered
        # Before it is sent: from then on the server reports a disconnect also where the client stays.
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            is_answered = True
        await send(message)

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        left.set()

    application = asyncio.ensure_future(app(scope, receive_body, send_noting_the_end))
    watcher = asyncio.ensure_future(watch())
    try:
        await asyncio.wait({application, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not application.done() and not is_answered:
            scope["state"]["client_left"] = True
            application.cancel()
        await asyncio.wait({application})
    finally:
        watcher.cancel()
        application.cancel()
        await asyncio.wait({application})
    if not (application.cancelled() and left.is_set()):
        application.result()


def parse_json(body: bytes, max_depth: int = MAX_DEPTH, max_json_items: int = MAX_JSON_ITEMS) -> Any:
    """Strict JSON (RFC 8259, UTF-8) → objects. Raises InvalidJsonError.

    Depth and number of items are measured before any object is built. Beside what is no JSON, these are refused:
    NaN, numbers too large for a double, integers beyond 64 bits, duplicate keys, lone surrogates.
    """
    _check_shape(body, max_depth, max_json_items)
    try:
        # Two parsers: pydantic's refuses what is not JSON to the letter, Python's shows every key and number.
        pydantic_core.from_json(body, allow_inf_nan=False, cache_strings="none")
        return _DECODER.decode(body.decode("utf-8"))
    except ValueError as error:
        raise InvalidJsonError(f"the body is not valid JSON: {error}") from None


def _check_shape(body: bytes, max_depth: int, max_json_items: int) -> None:
    # Exact up to the first byte that is no JSON, and no parser gets further. Without escapes a quote is an end of
    # a string.
    structure = body.replace(rb"\\", b"").replace(rb"\"", b"") if b"\\" in body else body
    structure = structure.translate(None, _NOT_STRUCTURE)
    # Every bracket and every comma stands beside two strings at most.
    num_items = structure.count(b'"') // 4
    if num_items <= max_json_items:
        structure = _STRINGS.sub(b"", structure)
        num_items = len(structure)
    if num_items > max_json_items:
        raise InvalidJsonError(
            f"the JSON body has more than {max_json_items} brackets, braces and commas; send less at once"
        )
    depth = max(accumulate(map(_DEPTH_CHANGE.__getitem__, structure)), default=0)
    if depth > max_depth:
        raise InvalidJsonError(f"the JSON body is nested {depth} deep; at most {max_depth} are read")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {_shown(twice)} is given twice")
    return found


def _integer(text: str) -> int:
    if not _LEAST_INTEGER <= (number := int(text)) <= _MOST_INTEGER:
        raise ValueError(f"integer {_shown(text)} has more than 64 bits")
    return number


def _double(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"number {_shown(text)} is too large")
    return number


def _shown(text: str) -> str:
    return repr(text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}…")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_int=_integer, parse_float=_double)
