"""Who answers a long list of questions: the engine in this process, or a service at --endpoint."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from wemm.cli.options import add_options, config_parameters, engine_parameters, optional_model
from wemm.config import EngineConfig, option
from wemm.errors import ParameterError
from wemm.progress import terminal_bar
from wemm.request import SamplingParams

if TYPE_CHECKING:
    from wemm.batch.question import Client

_ANSWERS_DEPEND_ON = ("dtype", "load_format", "plora", "reference_image_mode", "seed")


@dataclass(frozen=True)
class Endpoint:
    """A service to ask, and how."""

    endpoint: str | None = option(
        None,
        "Ask this OpenAI-compatible service (http://HOST:PORT/v1) in place of an engine in this process; --model "
        "is then its name for the model, by default the first it serves, and other engine options are its own.",
    )
    api_key: str | None = option(None, "Key for --endpoint. Default: the environment's OPENAI_API_KEY.")
    concurrency: int = option(16, "Questions under way at --endpoint at once.")
    timeout: float = option(600.0, "Seconds that an answer of --endpoint may take.")

    def __post_init__(self) -> None:
        if not 1 <= self.concurrency <= 1024:
            raise ParameterError(f"--concurrency must be in [1, 1024]. Given: {self.concurrency}")
        if not 0 < self.timeout < float("inf"):
            raise ParameterError(f"--timeout must be seconds above 0. Given: {self.timeout}")


class ClientOptions:
    """Which model, where."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._endpoint = Endpoint(**{field.name: values.pop(field.name) for field in fields(Endpoint)})
        self._model: str | None = values["model"]
        if self._model is None and self._endpoint.endpoint is None:
            raise ParameterError("give --model, or --endpoint with the URL of a service", "model")
        self._engine = EngineConfig(**{**values, "model": self._model or ""})

    @property
    def settings(self) -> dict[str, Any]:
        """What answers depend on, but for the question."""
        if self._endpoint.endpoint is not None:
            return {"model": self._model, "endpoint": self._endpoint.endpoint}
        return {"model": self._model, **{name: getattr(self._engine, name) for name in _ANSWERS_DEPEND_ON}}

    @contextmanager
    def open(self) -> Iterator[tuple[Client, SamplingParams]]:
        """Whoever answers, and what absent sampling options mean there. Raises ClientError."""
        endpoint = self._endpoint
        if endpoint.endpoint is not None:
            from wemm.batch.endpoint_client import EndpointClient

            key = endpoint.api_key or os.environ.get("OPENAI_API_KEY")
            url, concurrency, timeout = endpoint.endpoint, endpoint.concurrency, endpoint.timeout
            with EndpointClient(url, self._model, key, concurrency, timeout) as client:
                yield client, SamplingParams()
            return
        from wemm.batch.engine_client import EngineClient
        from wemm.engine.llm import LLM

        with LLM(progress=terminal_bar, **vars(self._engine)) as llm:
            yield EngineClient(llm), llm.default_sampling_params


def client_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of an engine and of an endpoint; it takes them as `options`."""
    parameters = [*config_parameters(Endpoint), *engine_parameters(optional_model())]
    return add_options(command, "options", parameters, ClientOptions)
