"""The service as it is run: `wemm serve` in a process of its own, on nano."""

from __future__ import annotations

import base64
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

httpx = pytest.importorskip("httpx")

ROOT = Path(__file__).parents[2]
IMAGES = ROOT / "docs/images"
START_SECONDS = 120


class Served:
    """A running service."""

    def __init__(self, *options: str, model: str = "nano", env: dict[str, str] | None = None) -> None:
        command = [sys.executable, "-m", "wemm", "serve", "--model", model, "--device", "cpu", "--port", "0"]
        if model == "nano":
            command += ["--dtype", "float32", "--max-model-len", "1024"]
        command += options
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1", **(env or {})}
        )
        self.log: list[str] = []
        self.urls: list[str] = []
        self._listening = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()
        if not self._listening.wait(START_SECONDS) or not self.urls:
            self.process.kill()
            raise AssertionError("".join(self.log))
        self.url = self.urls[0]

    def _read(self) -> None:
        with self.process.stderr as stderr:
            for line in stderr:
                self.log.append(line)
                if line.startswith("listening on "):
                    self.urls = line.split()[2:]
                    self._listening.set()
        self._listening.set()

    def wait_until_ready(self, verify: Any = True) -> Served:
        """Until /ready is green."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if httpx.get(f"{self.url}/ready", verify=verify).status_code == 200:
                return self
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        raise AssertionError("".join(self.log))

    def client(self, **options: Any) -> Any:
        """An HTTP client."""
        return httpx.Client(base_url=self.url, timeout=60, trust_env=False, **options)

    def stop(self) -> int:
        """As a service manager does; returns the exit status."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise


@pytest.fixture(scope="session")
def served() -> Iterator[Served]:
    """One service for every test that does not harm it."""
    service = Served()
    try:
        yield service.wait_until_ready()
    finally:
        assert service.stop() == 0


@contextmanager
def _starting() -> Iterator[Callable[..., Served]]:
    started: list[Served] = []

    def start(*options: str, **kwargs: Any) -> Served:
        started.append(Served(*options, **kwargs))
        return started[-1]

    try:
        yield start
    finally:
        for service in started:
            if service.process.poll() is None:
                service.process.kill()
                service.process.wait()


@pytest.fixture
def serve() -> Iterator[Callable[..., Served]]:
    """serve(*options): a service of one's own, ended with the test."""
    with _starting() as start:
        yield start


@pytest.fixture(scope="module")
def serve_module() -> Iterator[Callable[..., Served]]:
    """The same for a module."""
    with _starting() as start:
        yield start


@pytest.fixture
def client(served: Served) -> Iterator[Any]:
    with served.client() as client:
        yield client


def data_url(name: str) -> str:
    """An image of docs/images."""
    return "data:image/png;base64," + base64.b64encode((IMAGES / name).read_bytes()).decode()


def image_part(name: str, **more: Any) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(name), **more}}


QUESTIONS = {
    "word.png": ("What word is written here?", "WEMM"),
    "number.png": ("图中的数字是多少？", "2048"),
    "shapes.png": ("What colour is the star?", "blue"),
}


def conversation(name: str) -> list[dict[str, Any]]:
    """A question that nano answers right."""
    return [{"role": "user", "content": [image_part(name), {"type": "text", "text": QUESTIONS[name][0]}]}]
