"""A service whose answers a test writes."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Reply = tuple[int, dict[str, Any], dict[str, str]]
"""Status, body, headers."""


def completion(text: str, **usage: Any) -> Reply:
    """A chat completion."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    body = {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
    if usage:
        body["usage"] = {"total_tokens": 0, **usage}
    return 200, body, {}


def refusal(status: int, message: str = "no", **headers: str) -> Reply:
    """An error."""
    return status, {"error": {"message": message, "type": "t", "param": None, "code": None}}, headers


class ScriptedService:
    """`reply` answers every chat completion; what was asked is kept in `bodies`."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.reply: Callable[[dict[str, Any]], Reply] = lambda body: completion("hello")
        self.models = ["first", "second"]
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.most_at_once = 0
        self._at_once = 0
        self._lock = threading.Lock()

    def answer(self, body: dict[str, Any]) -> Reply:
        with self._lock:
            self.bodies.append(body)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            return self.reply(body)
        finally:
            with self._lock:
                self._at_once -= 1


@contextmanager
def scripted_service() -> Iterator[ScriptedService]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            models = [{"id": name, "object": "model", "created": 0, "owned_by": "x"} for name in service.models]
            self._send(200, {"object": "list", "data": models}, {})

        def do_POST(self) -> None:
            service.keys.add(self.headers.get("authorization"))
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            self._send(*service.answer(body))

        def _send(self, status: int, body: Any, headers: dict[str, str]) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            for name, value in {"content-type": "application/json", **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that hung up is part of the tests."""

    server = Server(("127.0.0.1", 0), Handler)
    service = ScriptedService(f"http://127.0.0.1:{server.server_port}/v1")
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield service
    finally:
        server.shutdown()
        server.server_close()
