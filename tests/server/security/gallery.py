"""A web server with images, as rude to those who fetch them as the test wants."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable
from contextlib import suppress

Answer = bytes | Callable[[socket.socket], None]
"""What is sent, or who sends it."""


def response(body: bytes, status: str = "200 OK", **headers: object) -> bytes:
    """The bytes of an HTTP answer; `content_type=…` becomes Content-Type."""
    named = {"content_length": len(body), **headers}
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in named.items() if value is not None)
    return f"HTTP/1.1 {status}\r\n{lines}\r\n".encode() + body


def redirect(location: str, status: str = "302 Found") -> bytes:
    return response(b"", status, location=location)


class Gallery:
    """On a free port of loopback. `pages` maps paths to answers, `requested` is what was asked for."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.pages: dict[str, Answer] = {}
        self.requested: list[str] = []
        self.ended: dict[str, float] = {}
        """Path → seconds until its client was gone or its answer at its end."""
        self._tls = tls
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        scheme = "http" if tls is None else "https"
        self.url = f"{scheme}://127.0.0.1:{self.port}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        self._socket.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with suppress(OSError), self._tls.wrap_socket(connection, True) if self._tls else connection as connection:
            request = b""
            while b"\r\n\r\n" not in request and (part := connection.recv(2**16)):
                request += part
            path = request.split(b" ")[1].decode() if b" " in request else ""
            self.requested.append(path)
            answer = self.pages.get(path, response(b"", "404 Not Found"))
            started = time.monotonic()
            try:
                answer(connection) if callable(answer) else connection.sendall(answer)
            finally:
                self.ended[path] = time.monotonic() - started


def endless(head: bytes, piece: bytes, pause: float = 0.0) -> Answer:
    """`head`, then `piece` again and again for as long as somebody takes it."""

    def send(connection: socket.socket) -> None:
        connection.sendall(head)
        while True:
            connection.sendall(piece)
            time.sleep(pause)

    return send
