"""What web pages may do through their visitor's browser: nothing, unless their origin is allowed.

A page can send requests to any address that its visitor reaches, this machine included. Its own origin betrays
it, or, once its name resolves to our address (DNS rebinding), the Host header does.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from http import HTTPStatus

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from wemm.errors import ParameterError
from wemm.server.rejection import Reject, reject_plainly

_AUTHORITY = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9._-]+)(?::([0-9]{1,5}))?")
_ORIGIN = re.compile(rf"(https?)://{_AUTHORITY.pattern}")
_DEFAULT_PORTS = {"http": "80", "https": "443"}
_LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
_METHODS = ("GET", "POST", "DELETE")
_MAX_SHOWN = 100


class HostGuard:
    """ASGI middleware: refuses names that are not ours, and pages of other origins.

    A service bound to a loopback address answers to localhost, 127.0.0.1, [::1], that address and
    `allowed_hosts`, names without ports. One bound elsewhere answers to every name, or, once some are allowed, to
    these, localhost and every address: rebinding takes a name. "*" is every name, and as an origin every origin.
    """

    def __init__(
        self,
        app: ASGIApp,
        bound_host: str,
        allowed_hosts: Sequence[str] = (),
        allowed_origins: Sequence[str] = (),
        reject: Reject = reject_plainly,
    ) -> None:
        """Raises ParameterError for what is no host and no origin."""
        self._origins = {origin if origin == "*" else _origin_option(origin) for origin in allowed_origins}
        self._hosts = _hosts(bound_host, allowed_hosts)
        self._is_public = not _is_loopback(_canonical(bound_host))
        self._reject = reject
        self._app = app
        if self._origins:
            # Keys travel in headers that a page must know, never in cookies: no credentials.
            self._app = CORSMiddleware(
                app, allow_origins=sorted(self._origins), allow_methods=_METHODS, allow_headers=("*",)
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the request through, or answer it."""
        app = self._checked(scope) if scope["type"] == "http" else self._app
        await app(scope, receive, send)

    def _checked(self, scope: Scope) -> ASGIApp:
        headers = _only_values(scope)
        authority = _AUTHORITY.fullmatch(headers.get(b"host", "").lower())
        if authority is None:
            message = "the request needs one Host header: a name or address, and a port if need be"
            return self._reject(scope, HTTPStatus.BAD_REQUEST, message, "invalid_host")
        host = _canonical(authority[1])
        if self._hosts is not None and host not in self._hosts and not (self._is_public and _is_address(host)):
            message = f"{host[:_MAX_SHOWN]!r} is no name of this service; --allowed-host adds one"
            return self._reject(scope, HTTPStatus.MISDIRECTED_REQUEST, message, "unknown_host")
        own_origin = _origin(scope["scheme"], authority[1], authority[2])
        if not self._may_call(headers, scope["method"], own_origin):
            message = "pages of other origins may not call this service; --allowed-origin adds one"
            return self._reject(scope, HTTPStatus.FORBIDDEN, message, "origin_not_allowed")
        return self._app

    def _may_call(self, headers: dict[bytes, str], method: str, own_origin: str) -> bool:
        given = headers.get(b"origin")
        if given is not None:
            origin = _ORIGIN.fullmatch(given)
            if origin is not None and _origin(origin[1], origin[2], origin[3]) in {own_origin, *self._origins}:
                return True
            return "*" in self._origins
        # A link that is followed shows its answer to the visitor alone.
        is_followed_link = method == "GET" and headers.get(b"sec-fetch-dest") == "document"
        return headers.get(b"sec-fetch-site") != "cross-site" or is_followed_link or "*" in self._origins


def _only_values(scope: Scope) -> dict[bytes, str]:
    """Header → value; what is given several times has all its values in one, and so is no valid one."""
    values: dict[bytes, str] = {}
    for name, value in scope["headers"]:
        text = value.decode("latin-1").strip()
        values[name] = f"{values[name]}, {text}" if name in values else text
    return values


def _hosts(bound_host: str, allowed_hosts: Sequence[str]) -> frozenset[str] | None:
    """Canonical names, or None for all."""
    if "*" in allowed_hosts:
        return None
    bound = _canonical(bound_host)
    if not allowed_hosts and not _is_loopback(bound):
        return None
    for host in allowed_hosts:
        match = _AUTHORITY.fullmatch(host.lower())
        if (match is None or match[2]) and not _is_address(host):
            raise ParameterError(f"an allowed host is a name or an address, without a port. Given: {host!r}")
    return frozenset(_canonical(host) for host in (bound, *_LOOPBACK_NAMES, *allowed_hosts))


def _canonical(host: str) -> str:
    host = host.lower().strip("[]")
    return ipaddress.ip_address(host).compressed if _is_address(host) else host.rstrip(".")


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_loopback(host: str) -> bool:
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def _origin(scheme: str, host: str, port: str | None) -> str:
    """As browsers write it."""
    name = _canonical(host)
    name = f"[{name}]" if ":" in name else name
    return f"{scheme}://{name}" if port in (None, _DEFAULT_PORTS[scheme]) else f"{scheme}://{name}:{port}"


def _origin_option(given: str) -> str:
    match = _ORIGIN.fullmatch(given.lower())
    if match is None:
        raise ParameterError(
            f"an allowed origin reads like https://example.com or http://localhost:3000. Given: {given!r}"
        )
    return _origin(match[1], match[2], match[3])
