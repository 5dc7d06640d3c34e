"""Who may ask: API keys in a header, a key of its own for what operators do, one spelling of every path."""

from __future__ import annotations

import hashlib
import hmac
import re
import stat
from collections.abc import Callable, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from wemm.errors import ParameterError
from wemm.server.rejection import Reject, reject_plainly

MIN_KEY_LENGTH = 16
MAX_KEY_FILE_BYTES = 2**20

_KEY = re.compile(rf"[!-~]{{{MIN_KEY_LENGTH},}}")
_KEY_RULE = f"an API key has at least {MIN_KEY_LENGTH} characters, all of them printable ASCII and none a space"
_ENCODED_SEPARATOR = re.compile(rb"%(2f|5c)", re.IGNORECASE)
# Control characters also because a route's pattern may end before a last line feed where a comparison does not.
_AMBIGUOUS_PATH = re.compile(r"[\x00-\x1f\x7f\\]|//|/\.{1,2}(/|$)")
_CALLER_LENGTH = 16


class Authentication:
    """ASGI middleware: lets in who shows a key, and notes in `scope["state"]["caller"]` whose it is.

    The caller is the same for the same key, and tells it to nobody: the start of its SHA-256; "" where no key was
    asked for. `open_paths` are open to GET and HEAD. `admin_paths` says which paths want the admin key, if there
    is one; it opens all others too.
    """

    def __init__(
        self,
        app: ASGIApp,
        api_keys: Mapping[str, str] | Sequence[str],
        admin_key: str | None,
        open_paths: frozenset[str],
        admin_paths: Callable[[str], bool],
        reject: Reject = reject_plainly,
    ) -> None:
        """`api_keys` are the keys, or names of callers and their keys."""
        keys = api_keys.values() if isinstance(api_keys, Mapping) else api_keys
        self._app = app
        self._digests = tuple(_digest(key) for key in keys)
        self._admin_digest = None if admin_key is None else _digest(admin_key)
        self._open_paths = open_paths
        self._admin_paths = admin_paths
        self._reject = reject

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request through, or answer it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})  # there are no such routes
        else:
            await self._checked(scope)(scope, receive, send)

    def _checked(self, scope: Scope) -> ASGIApp:
        path: str = scope["path"]
        if _AMBIGUOUS_PATH.search(path) or _ENCODED_SEPARATOR.search(scope.get("raw_path") or b""):
            message = "the path has empty or dot segments, backslashes, control characters or encoded slashes"
            return self._reject(scope, HTTPStatus.BAD_REQUEST, message, "invalid_path")
        state = scope.setdefault("state", {})
        state["caller"] = ""
        if path in self._open_paths and scope["method"] in ("GET", "HEAD"):
            return self._app
        is_for_admin = self._admin_paths(path) and self._admin_digest is not None
        if not self._digests and not is_for_admin:
            return self._app
        shown = _shown_keys(scope)
        if not shown:
            message = "an API key is needed, in Authorization: Bearer KEY or X-API-Key: KEY"
            return self._challenge(scope, message, "missing_api_key")
        if len(shown) > 1:
            return self._challenge(scope, "Authorization and X-API-Key hold different keys", "invalid_api_key")
        digest = hashlib.sha256(shown.pop()).digest()
        is_admin = self._admin_digest is not None and hmac.compare_digest(digest, self._admin_digest)
        # Every key is compared: the time does not tell which one was close.
        is_user = sum(hmac.compare_digest(digest, known) for known in self._digests) > 0
        if not is_admin and not is_user:
            return self._challenge(scope, "the API key is not known here", "invalid_api_key")
        if is_for_admin and not is_admin:
            message = "this path needs the admin key, the key given is another"
            return self._reject(scope, HTTPStatus.FORBIDDEN, message, "admin_key_required")
        state["caller"] = digest.hex()[:_CALLER_LENGTH]
        return self._app

    def _challenge(self, scope: Scope, message: str, code: str) -> ASGIApp:
        refusal = self._reject(scope, HTTPStatus.UNAUTHORIZED, message, code)

        async def challenge(scope: Scope, receive: Receive, send: Send) -> None:
            async def send_challenge(message: Message) -> None:
                if message["type"] == "http.response.start":
                    message = {
                        **message,
                        "headers": [*message.get("headers", ()), (b"www-authenticate", b"Bearer")],
                    }
                await send(message)

            await refusal(scope, receive, send_challenge)

        return challenge


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def _shown_keys(scope: Scope) -> set[bytes]:
    shown = set()
    for name, value in scope["headers"]:
        if name == b"x-api-key":
            shown.add(value.strip())
        elif name == b"authorization":
            scheme, _, key = value.strip().partition(b" ")
            if scheme.lower() == b"bearer":
                shown.add(key.strip())
    return shown - {b""}


def read_api_keys(values: Sequence[str], file: Path | None) -> tuple[str, ...]:
    """The keys given as options and those of a file: one per line, `#` begins a comment line.

    Raises ParameterError, in which no key is ever quoted.
    """
    for i, value in enumerate(values, 1):
        if not _KEY.fullmatch(value):
            raise ParameterError(f"API key number {i} of the options cannot be used: {_KEY_RULE}")
    return tuple(dict.fromkeys([*values, *(_read_key_file(file) if file is not None else ())]))


def _read_key_file(file: Path) -> list[str]:
    try:
        with file.open("rb") as opened:
            mode = stat.S_IMODE(file.stat().st_mode)
            text = opened.read(MAX_KEY_FILE_BYTES + 1)
    except OSError as error:
        raise ParameterError(f"API key file {file} cannot be read: {error.strerror}") from None
    if mode & 0o077:
        raise ParameterError(f"API key file {file} is open to others (mode {mode:04o}); chmod 600 {file}")
    if len(text) > MAX_KEY_FILE_BYTES:
        raise ParameterError(f"API key file {file} has more than {MAX_KEY_FILE_BYTES} bytes")
    keys = []
    for i, line in enumerate(text.decode("latin-1").splitlines(), 1):
        key = line.strip()
        if not key or key.startswith("#"):
            continue
        if not _KEY.fullmatch(key):
            raise ParameterError(f"line {i} of API key file {file} cannot be used: {_KEY_RULE}")
        keys.append(key)
    if not keys:
        raise ParameterError(f"API key file {file} holds no key")
    return keys
