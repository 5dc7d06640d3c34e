"""What all dialects share: a question is admitted, its images are loaded, the engine answers it."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from wemm.engine.async_llm import AsyncLLM, joined
from wemm.engine.intake import Process, process_text_or_ids
from wemm.engine.sequence import Request
from wemm.errors import ClientError, WemmError
from wemm.processing.processor import ProcessedPrompt, Processor
from wemm.request import RequestOutput, SamplingParams
from wemm.server.admission import Admission
from wemm.server.config import ServerConfig
from wemm.server.context import RequestContext
from wemm.server.engine_supervisor import EngineSupervisor
from wemm.server.errors import UnknownModelError, refusal
from wemm.server.media import MediaLoader
from wemm.server.metrics import Metrics

logger = logging.getLogger(__name__)

Messages = Sequence[Mapping[str, Any]]
_LONGEST_RETRY = 60
_FORGETTING = 0.1


@dataclass(frozen=True)
class Question:
    """What a dialect makes of a body."""

    prompt: Messages | str | Sequence[int]
    """Messages, raw text or token ids."""
    params: SamplingParams
    priority: int = 0
    timeout: float | None = None
    process: Callable[[Processor], Process] | None = None
    """How raw text becomes tokens, if not as it is."""

    @property
    def is_chat(self) -> bool:
        """Whether the prompt is messages."""
        return not isinstance(self.prompt, str) and bool(self.prompt) and isinstance(self.prompt[0], Mapping)


class Generation:
    """One admitted question, prepared and ready to be computed."""

    def __init__(self, llm: AsyncLLM, request: Request, metrics: Metrics, context: RequestContext) -> None:
        self.request_id = request.request_id
        self.params = request.sampling_params
        self.prompt_token_ids = request.prompt.token_ids
        """Image positions included."""
        self._llm = llm
        self._metrics = metrics
        self._context = context
        self._outputs = llm.answer(request)

    async def deltas(self) -> AsyncGenerator[RequestOutput, None]:
        """Once. Leaving the iteration aborts. Raises WemmError."""
        self._context.stage = "generate"
        num_tokens = 0
        async with aclosing(self._outputs) as outputs:
            async for output in outputs:
                num_tokens += sum(len(answer.token_ids) for answer in output.outputs)
                if output.finished:
                    self._metrics.finished(output, num_tokens)
                    self._context.figures.update(
                        prompt_tokens=len(self.prompt_token_ids),
                        image_tokens=output.num_image_tokens,
                        cached_tokens=output.num_cached_tokens,
                        completion_tokens=num_tokens,
                        first_token_seconds=round(output.metrics.first_token, 4),
                    )
                yield output

    async def complete(self) -> RequestOutput:
        """The whole answer."""
        async with aclosing(self.deltas()) as deltas:
            return joined([output async for output in deltas])


async def complete_all(generations: Sequence[Generation]) -> list[RequestOutput]:
    """Whole answers, computed side by side. Raises the first error, and ends the others."""
    tasks = [asyncio.ensure_future(generation.complete()) for generation in generations]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        await _end(tasks)


async def merged(generations: Sequence[Generation]) -> AsyncGenerator[tuple[int, RequestOutput], None]:
    """Deltas of all, each with the number of its generation, as they come."""
    streams = [generation.deltas() for generation in generations]
    following = {asyncio.ensure_future(anext(stream)): i for i, stream in enumerate(streams)}
    try:
        while following:
            done, _ = await asyncio.wait(following, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                i = following.pop(task)
                try:
                    output = task.result()
                except StopAsyncIteration:
                    continue
                following[asyncio.ensure_future(anext(streams[i]))] = i
                yield i, output
    finally:
        await _end(following)
        for stream in streams:
            await stream.aclose()


async def _end(tasks: Iterable[asyncio.Future[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class Service:
    """One model at an address."""

    def __init__(
        self,
        config: ServerConfig,
        model_name: str,
        supervisor: EngineSupervisor,
        media: MediaLoader,
        metrics: Metrics,
    ) -> None:
        self.config = config
        self.model_name = model_name
        self.supervisor = supervisor
        self.metrics = metrics
        self.started = int(time.time())
        self.draining = False
        self._media = media
        self.admission = Admission(config.max_queued_requests, config.max_queued_bytes)
        self._usual_seconds = 1.0
        metrics.watch(
            lambda: supervisor.stats, lambda: self.is_ready, lambda: supervisor.num_restarts, self.admission
        )
        metrics.listen(lambda output, num_tokens: self._took(output.metrics.total))

    @property
    def is_ready(self) -> bool:
        """Whether new requests are welcome."""
        return self.supervisor.is_ready and not self.draining

    @property
    def llm(self) -> AsyncLLM:
        """The engine. Raises EngineDeadError while there is none that answers."""
        return self.supervisor.llm

    def check_model(self, name: str | None) -> None:
        """Raises UnknownModelError."""
        if name not in (None, "", self.model_name):
            raise UnknownModelError(f"model {str(name)[:100]!r} is not served here; it is {self.model_name!r}")

    async def begin(self, question: Question, context: RequestContext) -> Generation:
        """Everything that can be refused. Raises ClientError, OverloadedError, EngineDeadError."""
        llm = self.llm
        context.resources.enter_context(self.admission.admit(self._retry_after()))
        prompt, process = await self._loaded(question, context, llm)
        context.stage = "prepare"
        timeout = min(question.timeout or math.inf, self.config.request_timeout)
        request = await llm.prepare(
            prompt, process, question.params, question.priority, timeout, cache_salt=context.caller
        )
        return Generation(llm, request, self.metrics, context)

    async def count(self, question: Question, context: RequestContext) -> ProcessedPrompt:
        """The prompt as the model would see it, images included, without computing anything."""
        llm = self.llm
        context.resources.enter_context(self.admission.admit(self._retry_after()))
        prompt, process = await self._loaded(question, context, llm)
        return await asyncio.to_thread(process, prompt)

    def note(self, error: Exception) -> None:
        """Count a refused or failed request; log what is ours."""
        self.metrics.failed(refusal(error).kind)
        if not isinstance(error, WemmError):
            logger.error("a request failed", exc_info=error)
        elif not isinstance(error, ClientError):
            logger.warning("a request failed: %s", error)

    async def _loaded(self, question: Question, context: RequestContext, llm: AsyncLLM) -> tuple[Any, Process]:
        if not question.is_chat:
            return question.prompt, (question.process or process_text_or_ids)(llm.processor)
        context.stage = "fetch"
        started = time.perf_counter()
        messages: Messages = question.prompt  # type: ignore[assignment]
        context.hold(self._media.count(messages) * llm.max_image_bytes)
        messages = await self._media.load(messages)
        self.metrics.observe("fetch", time.perf_counter() - started)
        return messages, llm.processor.chat

    def _retry_after(self) -> int:
        """Seconds until there may be room: what requests took of late, times those ahead of a new one."""
        width = max(1, self.llm.config.max_num_seqs)
        seconds = self._usual_seconds * self.admission.num_requests / width
        return min(_LONGEST_RETRY, max(1, math.ceil(seconds)))

    def _took(self, seconds: float) -> None:
        self._usual_seconds += _FORGETTING * (seconds - self._usual_seconds)
