"""Fetches images by http: and https: URLs, from the hosts that the operator allowed and from nowhere else.

A URL of a stranger makes this machine connect where the stranger cannot: to its own services, its network, the
metadata of its cloud. So there are no hosts by default, and a host on the list must still resolve to public
addresses only, unless the list says `private:`. A name is resolved once per request, and what is dialled is the
address that was checked, with the name in the Host header and in the check of the certificate: the next answer of
the name server changes nothing.

The list has one entry per host:

    example.com              at the usual port of the scheme
    example.com:8443         at this port
    *.example.com            every name below, not example.com itself
    private:images.internal  also where it resolves to addresses that are not public
    private:127.0.0.1:8099   an address counts like a name

Certificates are checked against the usual authorities, or those in the file that SSL_CERT_FILE names.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import httpx

import wemm
from wemm.errors import MediaError, ParameterError

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""Name and port → IP addresses. Raises OSError."""

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

_MAX_URL_LEN = 4096
_PORTS = {"http": 80, "https": 443}
_REDIRECTS = (301, 302, 303, 307, 308)
_ENTRY = re.compile(r"(private:)?(\*\.)?(\[[^\[\]]+\]|[^\[\]:/\\?#@*]+)(?::([0-9]{1,5}))?")
_NAME = re.compile(r"[a-z0-9_-]{1,63}(\.[a-z0-9_-]{1,63})*")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_HEADERS = {
    "Accept": "image/jpeg, image/png, image/webp, image/gif, image/bmp",
    "Accept-Encoding": "identity",
    # A connection belongs to the name it was opened for; another name may have the same address.
    "Connection": "close",
    "User-Agent": f"wemm/{wemm.__version__}",
}


async def resolve_host(host: str, port: int) -> list[str]:
    """What the system's resolver says. Raises OSError."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


class Fetcher:
    """Reads images from allowed hosts, within limits of time and size."""

    def __init__(
        self,
        allowed_hosts: Sequence[str],
        max_bytes: int,
        *,
        connect_timeout: float = 5.0,
        total_timeout: float = 60.0,
        max_redirects: int = 3,
        resolve: Resolve = resolve_host,
    ) -> None:
        """`total_timeout`: seconds for one image, names, redirects and all. Raises ParameterError for an entry."""
        self._allowed = [_AllowedHost.parse(entry) for entry in allowed_hosts]
        self._max_bytes = max_bytes
        self._connect_timeout = connect_timeout
        self._total_timeout = total_timeout
        self._max_redirects = max_redirects
        self._resolve = resolve
        # Below httpx's client: no cookies, no proxies, no redirects, no decompression, no log of URLs.
        self._transport = httpx.AsyncHTTPTransport(
            verify=httpx.create_ssl_context(),
            trust_env=False,
            limits=httpx.Limits(max_connections=100, max_keepalive_connections=0),
        )

    async def fetch(self, url: str) -> bytes:
        """The body behind an http: or https: URL. Raises MediaError, which names scheme and host only."""
        if not self._allowed:
            raise MediaError(
                "remote images are off here: start the service with --allowed-media-host HOST for each host to "
                "fetch from, or send the image itself as a data: URL"
            )
        target = _parse(url)
        try:
            return await asyncio.wait_for(self._follow(target), self._total_timeout)
        except asyncio.TimeoutError:
            raise MediaError(f"{_origin(target)} took longer than {self._total_timeout:g} s") from None

    async def close(self) -> None:
        """Close what is open; fetches under way fail."""
        await self._transport.aclose()

    async def _follow(self, url: httpx.URL) -> bytes:
        first = url
        for _ in range(self._max_redirects + 1):
            found = await self._get(url)
            if isinstance(found, bytes):
                return found
            if url.scheme == "https" and found.scheme != "https":
                raise MediaError(f"{_origin(first)} redirects from https: to {found.scheme}:")
            url = found
        raise MediaError(f"{_origin(first)} redirects more than {self._max_redirects} times")

    async def _get(self, url: httpx.URL) -> bytes | httpx.URL:
        """The body, or where it is said to be."""
        host, addresses = await self._addresses(url)
        problem = ""
        try:
            for address in addresses:
                try:
                    response = await self._transport.handle_async_request(self._request(url, host, address))
                except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                    problem = _why(error)
                    continue
                try:
                    return await self._read(url, response)
                finally:
                    await response.aclose()
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            raise MediaError(f"{_origin(url)} broke off: {type(error).__name__}") from None
        raise MediaError(f"{_origin(url)} cannot be reached{problem}")

    def _request(self, url: httpx.URL, host: str, address: IPAddress) -> httpx.Request:
        seconds = {"read": self._total_timeout, "write": self._total_timeout, "pool": self._total_timeout}
        return httpx.Request(
            "GET",
            url.copy_with(host=str(address)),
            headers={**_HEADERS, "Host": _netloc(host, url.port)},
            extensions={"timeout": {**seconds, "connect": self._connect_timeout}, "sni_hostname": host},
        )

    async def _read(self, url: httpx.URL, response: httpx.Response) -> bytes | httpx.URL:
        origin, headers = _origin(url), response.headers
        if response.status_code in _REDIRECTS:
            location = headers.get("location", "")
            _check_characters(location)
            with contextlib.suppress(httpx.InvalidURL, ValueError):
                return _parse(str(url.join(location)))
            raise MediaError(f"{origin} redirects to a URL that is not valid")
        if response.status_code != 200:
            raise MediaError(f"{origin} answered with status {response.status_code}")
        if headers.get("content-encoding", "").strip().lower() not in ("", "identity"):
            raise MediaError(f"{origin} sent a compressed body, though none was asked for")
        too_large = MediaError(f"{origin}: the image has more than {self._max_bytes} bytes")
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > self._max_bytes:
            raise too_large
        body = bytearray()
        async for part in response.aiter_raw():
            body += part
            if len(body) > self._max_bytes:
                raise too_large
        return bytes(body)

    async def _addresses(self, url: httpx.URL) -> tuple[str, list[IPAddress]]:
        """The host as it was compared, and its addresses if all are acceptable. Nothing has been dialled yet."""
        with contextlib.suppress(OSError, ValueError):
            host, port = _host(url), url.port or _PORTS[url.scheme]
            entries = [entry for entry in self._allowed if entry.matches(url.scheme, host, port)]
            if entries:
                found = [host] if _is_address(host) else await self._resolve(host, port)
                addresses = [ipaddress.ip_address(address) for address in dict.fromkeys(found)]
                accepts = _is_unicast if any(entry.private for entry in entries) else _is_public
                if addresses and all(map(accepts, addresses)):
                    return host, addresses
        # One message: whether a host exists, and where, is nothing to tell.
        raise MediaError(
            f"{_origin(url)} is not fetched: only hosts given with --allowed-media-host are, and only at public "
            "addresses unless given as private:HOST"
        )


@dataclass(frozen=True)
class _AllowedHost:
    """One entry of the list."""

    host: str
    port: int | None
    below: bool
    """Names below the host instead of itself."""
    private: bool

    @classmethod
    def parse(cls, entry: str) -> _AllowedHost:
        """Raises ParameterError."""
        match = _ENTRY.fullmatch(entry)
        with contextlib.suppress(httpx.InvalidURL, ValueError):
            if match is not None and (match[4] is None or 0 < int(match[4]) < 2**16):
                host = _host(httpx.URL(f"http://{match[3]}/"))
                return cls(host, int(match[4]) if match[4] else None, bool(match[2]), bool(match[1]))
        raise ParameterError(
            "an allowed media host is written like example.com, example.com:8443, *.example.com or "
            f"private:images.internal. Given: {entry!r:.100}"
        )

    def matches(self, scheme: str, host: str, port: int) -> bool:
        """Whether it allows this."""
        if port != (self.port or _PORTS[scheme]):
            return False
        return host.endswith(f".{self.host}") if self.below else host == self.host


def _parse(text: str) -> httpx.URL:
    """The URL that is checked and used. Raises MediaError, whose message repeats nothing but the scheme."""
    _check_characters(text)
    try:
        url = httpx.URL(text)
    except (httpx.InvalidURL, ValueError):
        raise MediaError("the URL is not valid") from None
    if url.scheme not in _PORTS:
        raise MediaError(f"a URL must begin with http:, https: or data:. Given: {url.scheme[:20]!r}")
    if url.userinfo:
        raise MediaError("a URL with a user name or a password is not fetched")
    if not url.host or (url.port is not None and not 0 < url.port < 2**16):
        raise MediaError("the URL is not valid")
    return url


def _check_characters(text: str) -> None:
    """What parsers read differently, before any reads it."""
    if len(text) > _MAX_URL_LEN:
        raise MediaError(f"the URL has {len(text)} characters; at most {_MAX_URL_LEN} are read")
    if not text.isprintable() or "\\" in text or "%00" in text:
        raise MediaError("the URL has a backslash or a control character")


def _host(url: httpx.URL) -> str:
    """The host in the one spelling in which it is compared: punycode, or an address. Raises ValueError."""
    host = url.raw_host.decode("ascii").removesuffix(".")
    if ":" in host and "%" not in host:
        return str(ipaddress.IPv6Address(host))
    if not _NAME.fullmatch(host):
        raise ValueError("no host name")
    if _NUMBER.fullmatch(host.rpartition(".")[2]):
        return str(ipaddress.IPv4Address(host))  # refuses what only the system's resolver takes for an address
    return host


def _is_address(host: str) -> bool:
    return ":" in host or _NUMBER.fullmatch(host.rpartition(".")[2]) is not None


def _is_unicast(address: IPAddress) -> bool:
    return not address.is_multicast and not address.is_unspecified


def _is_public(address: IPAddress) -> bool:
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return _is_public(inner)
        if address not in _GLOBAL_UNICAST:
            return False
    return address.is_global and _is_unicast(address) and not address.is_reserved


def _netloc(host: str, port: int | None) -> str:
    return (f"[{host}]" if ":" in host else host) + ("" if port is None else f":{port}")


def _origin(url: httpx.URL) -> str:
    """All of a URL that may be shown: path and query often hold a key."""
    return f"{url.scheme}://{_netloc(url.raw_host.decode('ascii')[:100], None)}"


def _why(error: BaseException) -> str:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f": {cause.verify_message}"
        cause = cause.__cause__ or cause.__context__
    return ""
