"""Both planes over one engine on nano, without a socket between."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

httpx = pytest.importorskip("httpx")
pytest.importorskip("fastapi")

from wemm.engine.async_llm import AsyncLLM
from wemm.server.app import make_app, make_management_app
from wemm.server.config import ServerConfig
from wemm.server.engine_supervisor import EngineSupervisor
from wemm.server.fetch import Fetcher
from wemm.server.media import MediaLoader
from wemm.server.metrics import Metrics
from wemm.server.service import Service

IMAGES = Path(__file__).parents[3] / "docs/images"


class Planes:
    """The business and the management plane of one service."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, supervisor: EngineSupervisor, config: ServerConfig
    ) -> None:
        self.stops: list[bool] = []
        self.loop = loop
        media = MediaLoader(Fetcher([], 2**20), None, config.max_images, config.max_image_size)
        self.service = Service(config, "nano", supervisor, media, Metrics("nano"))
        self._business = make_app(self.service, ())
        self._management = make_management_app(self.service, (), self.stops.append)

    async def send(self, method: str, path: str, body: Any = None, management: bool = False) -> Any:
        """Of several requests side by side."""
        transport = httpx.ASGITransport(self._management if management else self._business)
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=120) as client:
            return await client.request(method, path, content=data)

    def post(self, path: str, body: Any) -> Any:
        return self.loop.run_until_complete(self.send("POST", path, body))

    def get(self, path: str) -> Any:
        return self.loop.run_until_complete(self.send("GET", path))

    def manage(self, path: str, method: str = "GET") -> Any:
        return self.loop.run_until_complete(self.send(method, path, management=True))


class Running:
    """An engine that runs, and planes over it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, supervisor: EngineSupervisor) -> None:
        self.loop = loop
        self.supervisor = supervisor

    def planes(self, **config: Any) -> Planes:
        return Planes(self.loop, self.supervisor, ServerConfig(**config))


@pytest.fixture(scope="session")
def engine() -> Iterator[Running]:
    loop = asyncio.new_event_loop()
    options = {"dtype": "float32", "device": "cpu", "max_model_len": 1024}
    supervisor = EngineSupervisor(lambda: AsyncLLM("nano", **options), max_restarts=0, warm_up=False)

    async def start() -> asyncio.Task[None]:
        await supervisor.start()
        running = asyncio.create_task(supervisor.run())
        while not supervisor.is_ready:
            await asyncio.sleep(0.01)
        return running

    async def end(running: asyncio.Task[None]) -> None:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

    running = loop.run_until_complete(start())
    yield Running(loop, supervisor)
    loop.run_until_complete(end(running))
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()


@pytest.fixture
def planes(engine: Running) -> Iterator[Planes]:
    """A fresh service; nothing of it may be left when the test ends."""
    planes = engine.planes()
    yield planes
    assert planes.service.admission.num_requests == 0
    assert planes.service.admission.num_bytes == 0


@pytest.fixture(scope="session")
def image_url() -> Any:
    """image_url("word.png"): a part with an image of docs/images."""

    def make(name: str) -> dict[str, Any]:
        data = base64.b64encode((IMAGES / name).read_bytes()).decode()
        return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}

    return make


@pytest.fixture(scope="session")
def word(image_url: Any) -> list[dict[str, Any]]:
    """A question whose answer is WEMM."""
    return [image_url("word.png"), {"type": "text", "text": "What word is written here?"}]
