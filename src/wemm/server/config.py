"""How to serve a model: the field texts are the `--help` of `wemm serve`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from wemm.config import option
from wemm.errors import ParameterError

_LEAST = {
    **dict.fromkeys(
        (
            "max_images", "max_image_size", "max_image_pixels", "decode_workers", "max_body_size",
            "max_queued_requests", "max_queued_bytes", "max_connections", "default_max_tokens",
        ),
        1,
    ),
    **dict.fromkeys(("decode_timeout", "request_timeout"), 0.001),
    **dict.fromkeys(("drain_timeout", "max_restarts"), 0),
}  # fmt: skip


@dataclass(frozen=True)
class ServerConfig:
    """Addresses, keys, limits. Every default is the safe one."""

    host: str = option("127.0.0.1", "Address to listen on. Addresses beyond this machine want --api-key and TLS.")
    port: int = option(8000, "Port to listen on; 0 takes a free one.")
    allow_public: bool = option(False, "Allow an address of all networks (0.0.0.0 or ::).")
    management_host: str = option("127.0.0.1", "Address of the management routes.")
    management_port: int | None = option(
        None, "Port of the management routes (MindIE's health, info, slot count, stop). Default: none."
    )
    metrics_port: int | None = option(None, "Another port for /metrics alone, beside --port. Default: none.")
    served_model_name: str | None = option(None, "Name of the model in requests. Default: the name of its files.")

    api_key: list[str] = option(
        [],
        "Key that every route but /health and /ready asks for; repeat for several callers, whose caches are then "
        "apart. Also read from WEMM_API_KEY.",
    )
    api_key_file: Path | None = option(None, "File with one API key per line.")
    admin_key: str | None = option(
        None, "Key of the management routes and /metrics. Also read from WEMM_ADMIN_KEY. Default: any API key."
    )
    tls_certificate: Path | None = option(None, "PEM file: certificate and chain. With --tls-key: HTTPS.")
    tls_key: Path | None = option(None, "PEM file of the private key.")
    tls_client_ca: Path | None = option(None, "PEM file: clients must show a certificate of this authority.")
    allowed_host: list[str] = option(
        [],
        "Names under which clients may call (Host header); repeat. Default on loopback: localhost and the "
        "address; elsewhere any.",
    )
    allowed_origin: list[str] = option(
        [],
        "Web origins whose pages may call (CORS); repeat. Default: none.",
    )

    allowed_media_host: list[str] = option(
        [],
        "Host from which images may be fetched: example.com, *.example.com, host:port, or private:host for one "
        "on a private network; repeat. Default: none, nothing is fetched.",
    )
    allowed_local_media_path: Path | None = option(
        None, "Directory from which file:// images may be read. Default: none, no file is read."
    )
    max_images: int = option(20, "Images of one request at most.")
    max_image_size: int = option(20 * 2**20, "Bytes of one image at most (20MiB, …).")
    max_image_pixels: int = option(50_000_000, "Width times height of one image at most, before it is resized.")
    decode_workers: int = option(2, "Processes that decode images, each with limits on memory and time.")
    decode_timeout: float = option(20.0, "Seconds for decoding one image at most.")

    max_body_size: int = option(40 * 2**20, "Bytes of one request body at most (40MiB, …).")
    max_queued_requests: int = option(256, "Requests accepted at once at most, waiting and running; then 429.")
    max_queued_bytes: int = option(
        2**30, "Bytes of all accepted bodies and their images as pixels at most; then 429."
    )
    max_connections: int = option(1024, "Open connections at most; then 503.")
    request_timeout: float = option(600.0, "Seconds for one answer at most, its time in the queue included.")
    default_max_tokens: int | None = option(
        None, "max_tokens of OpenAI requests that give none. Default: what the model has room for."
    )
    full_text: bool = option(
        False, "Repeat the whole answer as full_text in the last event of MindIE's streams (its fullTextEnabled)."
    )
    drain_timeout: float = option(
        30.0, "Seconds that requests under way get to finish when the service is stopped."
    )
    max_restarts: int = option(3, "Times the engine is started again within ten minutes after it died.")
    warm_up: bool = option(True, "Answer about an image of the largest size before /ready turns green.")
    log_level: str = option("info", "debug, info, warning or error. Never logs prompts, answers or images.")

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and not least <= value < math.inf:  # false for NaN
                raise ParameterError(f"{name} must be a number of at least {least:g}. Given: {value!r}", name)
