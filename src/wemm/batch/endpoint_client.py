"""Answers from any OpenAI-compatible service, several questions on their way at once."""

from __future__ import annotations

import base64
import time
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import fields
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wemm.batch.question import Answer, Question
from wemm.errors import EndpointError, MediaError, ParameterError
from wemm.processing.chat_template import Message
from wemm.processing.media import image_file
from wemm.request import SamplingParams

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types.chat import ChatCompletion

_MAX_RETRIES = 8
_STANDARD = ("max_tokens", "temperature", "top_p", "stop", "seed", "presence_penalty", "frequency_penalty")
"""Sampling parameters that OpenAI's own API has; others travel beside them where they differ from the default."""


class EndpointClient:
    """Asks a service over HTTP. Overload (429, 503) and lost connections are retried, as long as it asks for."""

    def __init__(
        self,
        url: str,
        model: str | None = None,
        api_key: str | None = None,
        concurrency: int = 16,
        timeout: float = 600.0,
    ) -> None:
        """`url` ends in /v1 as a rule; `model` is by default the first that it serves. Raises EndpointError."""
        try:
            import openai
        except ImportError:
            raise ParameterError("--endpoint needs the openai package: pip install 'wemm[eval]'") from None
        if not url.startswith(("http://", "https://")):
            raise ParameterError(f"--endpoint is a URL such as http://127.0.0.1:8000/v1. Given: {url!r}")
        self._url = url
        self._openai = openai
        self._client: OpenAI = openai.OpenAI(
            base_url=url, api_key=api_key or "none", timeout=timeout, max_retries=_MAX_RETRIES
        )
        self._concurrency = concurrency
        try:
            self._model = self._served(model)
        except BaseException:
            self.close()
            raise

    @property
    def model(self) -> str:
        """As the service calls it."""
        return self._model

    def answers(self, questions: Iterable[Question]) -> Generator[tuple[int, Answer], None, None]:
        """See `Client`. Raises EndpointError if the service is gone, or refuses whatever it is asked."""
        waiting = enumerate(questions)
        pool = ThreadPoolExecutor(self._concurrency, "wemm-endpoint")
        under_way: dict[Future[Answer], int] = {}
        try:
            while True:
                for place, question in islice(waiting, self._concurrency - len(under_way)):
                    under_way[pool.submit(self._ask, question)] = place
                if not under_way:
                    return
                done, _ = wait(under_way, return_when=FIRST_COMPLETED)
                for future in done:
                    yield under_way.pop(future), future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def __enter__(self) -> EndpointClient:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _served(self, model: str | None) -> str:
        """The model to ask. That the service is there is seen here, not after a minute of retries."""
        try:
            served = [entry.id for entry in self._client.with_options(max_retries=1).models.list().data]
        except self._openai.NotFoundError as error:
            if model is None:
                raise self._broken(error) from None
            return model  # a service without a list
        except self._openai.OpenAIError as error:
            raise self._broken(error) from None
        if model is None and not served:
            raise EndpointError(f"{self._url} serves no model; name one by --model")
        return model or served[0]

    def _ask(self, question: Question) -> Answer:
        openai, started = self._openai, time.perf_counter()
        try:
            messages: Any = [_on_the_wire(message) for message in question.messages]
            completion = self._client.chat.completions.create(
                model=self._model, messages=messages, **_parameters(question.sampling)
            )
        except MediaError as error:
            return Answer.failed(error)
        except openai.APITimeoutError as error:
            return Answer.failed(EndpointError(f"no answer in time: {error}"), "timeout")
        except _fatal(openai) as error:
            raise self._broken(error) from None
        except openai.APIStatusError as error:
            return Answer.failed(EndpointError(error.message), str(error.status_code))
        except (openai.OpenAIError, ValueError) as error:
            return Answer.failed(EndpointError(f"the service's answer cannot be read: {error}"))
        return _answer(completion, time.perf_counter() - started)

    def _broken(self, error: Exception) -> EndpointError:
        if isinstance(error, self._openai.APIConnectionError):
            reason = error.__cause__ or error
            return EndpointError(f"{self._url} cannot be reached: {reason}; is the service running?")
        remedies = {401: "give --api-key", 403: "give a key that may", 404: "the URL ends in /v1 as a rule, the "
                    "model is one of GET /v1/models"}  # fmt: skip
        status = getattr(error, "status_code", None)
        remedy = f"; {remedies[status]}" if status in remedies else ""
        return EndpointError(f"{self._url} refuses: {error}{remedy}")


def _fatal(openai: Any) -> tuple[type[Exception], ...]:
    """What no other question would fare better with."""
    return (
        openai.APIConnectionError,
        openai.AuthenticationError,
        openai.PermissionDeniedError,
        openai.NotFoundError,
    )


def _answer(completion: ChatCompletion, seconds: float) -> Answer:
    if not completion.choices:
        return Answer.failed(EndpointError("the service answered without a choice"), "empty")
    choice, usage = completion.choices[0], completion.usage
    details: Mapping[str, Any] = {}
    if usage is not None and usage.prompt_tokens_details is not None:
        details = usage.prompt_tokens_details.model_dump()
    return Answer(
        text=choice.message.content or "",
        finish_reason=choice.finish_reason,
        prompt_tokens=usage.prompt_tokens if usage else 0,
        completion_tokens=usage.completion_tokens if usage else 0,
        image_tokens=details.get("image_tokens") or 0,
        cached_tokens=details.get("cached_tokens") or 0,
        seconds=round(seconds, 6),
    )


def _on_the_wire(message: Message) -> dict[str, Any]:
    content = message.get("content")
    if not isinstance(content, list):
        return dict(message)
    return {**message, "content": [_part(part) for part in content]}


def _part(part: Mapping[str, Any]) -> Mapping[str, Any]:
    if part.get("type") != "image":
        return part
    data, kind = image_file(Path(part["image"]))
    url = f"data:image/{kind.lower()};base64,{base64.b64encode(data).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def _parameters(sampling: SamplingParams) -> dict[str, Any]:
    default = SamplingParams()
    standard = {name: getattr(sampling, name) for name in _STANDARD}
    standard["stop"] = list(sampling.stop_strings) or None
    extra = dict(_changed(sampling, default))
    return {**{k: v for k, v in standard.items() if v is not None}, "extra_body": extra or None}


def _changed(sampling: SamplingParams, default: SamplingParams) -> Iterator[tuple[str, Any]]:
    for field in fields(sampling):
        value = getattr(sampling, field.name)
        if field.name not in _STANDARD and value != getattr(default, field.name):
            yield field.name, value
