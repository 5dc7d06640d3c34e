"""Configs → a running service: engine, decoders and listeners, from start to stop."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from wemm.config import EngineConfig
from wemm.engine.async_llm import AsyncLLM
from wemm.engine.build import find_source
from wemm.errors import ParameterError
from wemm.processing.decode_pool import DecodePool
from wemm.processing.image_processor import ProcessedImage
from wemm.progress import ProgressBar
from wemm.server.app import make_app, make_management_app, make_metrics_app
from wemm.server.auth import read_api_keys
from wemm.server.config import ServerConfig
from wemm.server.connection import ConnectionLimits
from wemm.server.engine_supervisor import EngineSupervisor
from wemm.server.fetch import Fetcher
from wemm.server.listen import Listener, TlsConfig, serve
from wemm.server.media import MediaLoader
from wemm.server.metrics import Metrics
from wemm.server.service import Service

_M_ARENA_MAX = -8
_MAX_THREADS = 256


def run(
    server: ServerConfig,
    engine: EngineConfig,
    progress: ProgressBar,
    on_started: Callable[[Sequence[str]], None],
) -> None:
    """Serve until a signal ends it. Raises ClientError for whatever the operator can mend."""
    _use_one_heap()
    asyncio.run(_run(server, engine, progress, on_started))


async def _run(
    server: ServerConfig,
    engine: EngineConfig,
    progress: ProgressBar,
    on_started: Callable[[Sequence[str]], None],
) -> None:
    api_keys = read_api_keys(server.api_key, server.api_key_file)
    read_api_keys([server.admin_key] if server.admin_key else [], None)  # refused by the same rules
    model_name = server.served_model_name or Path(engine.model).name
    metrics = Metrics(model_name)
    # For whatever would hold up the event loop; some of it waits for decoders, and others must not wait for it.
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_MAX_THREADS, "wemm-serve"))
    decoders = DecodePool(
        find_source(engine).config,
        server.decode_workers,
        reference_image_mode=engine.reference_image_mode,
        max_image_pixels=server.max_image_pixels,
        timeout=server.decode_timeout,
    )
    fetcher = Fetcher(server.allowed_media_host, server.max_image_size)

    def read_image(data: Any, detail: str) -> ProcessedImage:
        decoded = decoders.process(data, detail)
        metrics.observe("decode", decoded.decode_seconds)
        metrics.observe("preprocess", decoded.preprocess_seconds)
        return decoded.image

    def start() -> AsyncLLM:
        return AsyncLLM(progress=progress, read_image=read_image, **asdict(engine))

    supervisor = EngineSupervisor(start, server.max_restarts, server.warm_up)
    media = MediaLoader(fetcher, server.allowed_local_media_path, server.max_images, server.max_image_size)
    service = Service(server, model_name, supervisor, media, metrics)
    limits = ConnectionLimits(max_connections=server.max_connections)

    def drain() -> None:
        service.draining = True

    is_listening = asyncio.Event()

    def announce(urls: Sequence[str]) -> None:
        on_started(urls)
        is_listening.set()

    async def keep_engine() -> None:
        await is_listening.wait()  # no model is loaded for a service that may not listen, or cannot
        await supervisor.start()
        await supervisor.run()

    listening = asyncio.create_task(
        serve(
            _listeners(server, service, api_keys),
            limits=limits,
            drain_timeout=server.drain_timeout,
            on_started=announce,
            on_drain=drain,
            allow_public=server.allow_public,
        )
    )
    keeping = asyncio.create_task(keep_engine())
    try:
        await asyncio.wait({listening, keeping}, return_when=asyncio.FIRST_COMPLETED)
        if keeping.done() and not listening.done():
            keeping.result()  # a model that cannot be loaded ends the service; a dead engine leaves it to say so
        await listening
    finally:
        for task in (listening, keeping):
            task.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await task
        await fetcher.close()
        decoders.close()


def _listeners(server: ServerConfig, service: Service, api_keys: tuple[str, ...]) -> list[Listener]:
    tls = None
    if server.tls_certificate is not None and server.tls_key is not None:
        tls = TlsConfig(server.tls_certificate, server.tls_key, server.tls_client_ca)
    elif server.tls_certificate or server.tls_key or server.tls_client_ca:
        raise ParameterError("HTTPS needs both --tls-certificate and --tls-key; --tls-client-ca goes with them")
    listeners = [Listener(make_app(service, api_keys), server.host, server.port, tls)]
    if server.management_port is not None:
        app = make_management_app(service, api_keys, _stop)
        listeners.append(Listener(app, server.management_host, server.management_port, tls))
    if server.metrics_port is not None:
        app = make_metrics_app(service, api_keys)
        listeners.append(Listener(app, server.management_host, server.metrics_port, tls))
    return listeners


def _use_one_heap() -> None:
    """glibc has one for every few threads, and in each of them stays some of what large bodies took."""
    if sys.platform == "linux":
        with suppress(AttributeError):  # another C library
            ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def _stop(force: bool) -> None:
    """As a signal would; forced, as two of them."""
    os.kill(os.getpid(), signal.SIGTERM)
    if force:
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)
