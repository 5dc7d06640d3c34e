"""AsyncLLM: the door for servers. Many callers on an event loop, the engine in a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from wemm.checkpoint.checkpoint import default_sampling_params
from wemm.config import EngineConfig, engine_config
from wemm.cost import largest_image
from wemm.engine.build import check, find_source, make_processor
from wemm.engine.engine import EngineStats
from wemm.engine.engine_process import Checked, Ended, EngineProcess, Report, Stepped
from wemm.engine.intake import Intake, Process, process_text_or_ids
from wemm.engine.sequence import Request
from wemm.engine.structured import GrammarCompiler
from wemm.errors import EngineError, WemmError
from wemm.processing.chat_template import Message
from wemm.processing.processor import Processor, ReadImage
from wemm.processing.tokenizer import Tokenizer
from wemm.progress import ProgressBar, silent
from wemm.request import CompletionOutput, RequestOutput, SamplingParams

_MAX_WAITING = 256
"""Threads, started when there is nothing else left to do for one."""


class _Mailbox:
    """What is new of one request, from the thread that hears the engine to the caller's event loop.

    Deltas that nobody has taken yet are joined: a slow caller costs no more than its answer.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._delta: RequestOutput | None = None
        self._error: WemmError | None = None

    def put(self, delta: RequestOutput) -> None:
        """On the event loop."""
        self._delta = delta if self._delta is None else joined([self._delta, delta])
        self._news.set()

    def fail(self, error: WemmError) -> None:
        """On the event loop: the engine has come to its end."""
        self._error = error
        self._news.set()

    def call(self, function: Callable[..., None], *arguments: Any) -> None:
        """From any thread: call one of the above."""
        with contextlib.suppress(RuntimeError):  # the caller's loop is closed: nobody waits
            self._loop.call_soon_threadsafe(function, *arguments)

    async def get(self) -> RequestOutput:
        """What is new. Raises the request's own error, or EngineError if the engine has come to its end."""
        await self._news.wait()
        if self._error is None:  # which is told again and again, after the last delta too
            self._news.clear()
        delta, self._delta = self._delta, None
        if delta is not None and delta.error is None:
            return delta
        error = self._error if delta is None else delta.error
        assert error is not None
        raise error


class AsyncLLM:
    """A loaded model that answers many at once.

        llm = AsyncLLM("nano")
        async for output in llm.chat(messages, SamplingParams(max_tokens=64)):
            print(output.outputs[0].text, end="")

    Every output holds what is new since the one before: text, token ids and log probabilities. Leaving the
    iteration, or cancelling its task, aborts the request. Options are those of `LLM`. Raises what `LLM` raises;
    EngineDeadError if the engine's process is gone.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        progress: ProgressBar = silent,
        read_image: ReadImage | None = None,
        **options: Any,
    ) -> None:
        """`read_image` decodes and resizes; by default in threads of this process."""
        self.config: EngineConfig = engine_config(model, options)
        source = find_source(self.config)
        self.tokenizer = Tokenizer(source.tokenizer_directory)
        check(self.config, source, self.tokenizer)
        self._process = EngineProcess(self.config, progress)
        started = self._process.started
        self.max_model_len: int = started.max_model_len
        """Tokens of prompt and answer together at most."""
        self.dtype: str = started.dtype
        width, height = largest_image(source.config).resized
        self.max_image_bytes: int = 3 * width * height
        """Of the pixels of an image at most, as a request keeps them."""
        self.default_sampling_params: SamplingParams = default_sampling_params(source.tokenizer_directory)
        """What absent parameters mean for this checkpoint."""
        self.processor: Processor = make_processor(
            self.config, source, self.tokenizer, self.max_model_len, read_image
        )
        grammars = GrammarCompiler(self.tokenizer, source.config.text.vocab_size)
        # Whoever reads images elsewhere waits for them here, and must not keep others waiting.
        num_workers = None if read_image is None else _MAX_WAITING
        self._intake = Intake(self.default_sampling_params, grammars, self.config.seed, num_workers)
        self._stats = started.stats
        self._mailboxes: dict[str, _Mailbox] = {}
        self._checks: list[Future[None]] = []
        self._end: EngineError | None = None
        self._ended: Future[EngineError] = Future()
        self._process.listen(self._hear)

    def chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
        cache_salt: str = "",
    ) -> AsyncGenerator[RequestOutput, None]:
        """Answer one conversation (see `LLM.chat`), in deltas; the last output is `finished`.

        Requests share caches with those of the same `cache_salt` only.
        """
        self._check_open()
        process = self.processor.chat
        return self._both(partial(self.prepare, messages, process, sampling_params, priority, timeout, cache_salt))

    def generate(
        self,
        prompt: str | Sequence[int],
        sampling_params: SamplingParams | None = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
        cache_salt: str = "",
    ) -> AsyncGenerator[RequestOutput, None]:
        """Continue raw text or token ids (see `LLM.generate`), in deltas."""
        self._check_open()
        process = process_text_or_ids(self.processor)
        return self._both(partial(self.prepare, prompt, process, sampling_params, priority, timeout, cache_salt))

    async def prepare(
        self,
        prompt: Any,
        process: Process,
        sampling_params: SamplingParams | None = None,
        priority: int = 0,
        timeout: float | None = None,
        cache_salt: str = "",
    ) -> Request:
        """The first half of `chat` and `generate`: all that can be refused is refused here."""
        self._check_open()
        future = self._intake.submit(prompt, process, sampling_params, priority, timeout, cache_salt)
        return await asyncio.wrap_future(future)

    async def answer(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        """The second half: compute a prepared request, in deltas."""
        request_id, prompt_token_ids = request.request_id, request.prompt.token_ids
        mailbox = self._mailboxes[request_id] = _Mailbox()
        try:
            self._check_open()
            # Its grammar is compiled once more over there: it cannot travel.
            self._process.order("add_request", replace(request, grammar=None))
            del request  # and with it the pixels: they are over there now
            finished = False
            while not finished:
                output = await mailbox.get()
                finished = output.finished
                yield (output if output.prompt_token_ids else replace(output, prompt_token_ids=prompt_token_ids))
        finally:
            del self._mailboxes[request_id]
            self._process.order("abort", request_id)

    @property
    def stats(self) -> EngineStats:
        """What the engine holds and has done, as of its last report."""
        self._check_open()
        return self._stats

    @property
    def engine_pid(self) -> int:
        """Of the engine's process."""
        return self._process.pid

    async def check_integrity(self) -> None:
        """Raises IntegrityError if the engine has lost a block or an image, or holds one for nobody."""
        self._check_open()
        asked: Future[None] = Future()
        self._checks.append(asked)
        self._process.order("check_integrity")
        await asyncio.wrap_future(asked)

    async def wait_until_ended(self) -> EngineError:
        """Why the engine came to its end: returns when it has."""
        return await asyncio.shield(asyncio.wrap_future(self._ended))

    async def close(self) -> None:
        """End the engine; requests under way raise EngineError."""
        self._end = self._end or EngineError("this AsyncLLM is closed")
        self._intake.close()
        await asyncio.to_thread(self._process.close)

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    def _check_open(self) -> None:
        if self._end is not None:
            raise self._end

    async def _both(self, prepare: Callable[[], Any]) -> AsyncGenerator[RequestOutput, None]:
        async with contextlib.aclosing(self.answer(await prepare())) as outputs:
            async for output in outputs:
                yield output

    def _hear(self, report: Report) -> None:
        """A report of the engine, in the thread that hears it."""
        if isinstance(report, Stepped):
            self._stats = report.stats
            for output in report.outputs:
                mailbox = self._mailboxes.get(output.request_id)
                if mailbox is not None:
                    mailbox.call(mailbox.put, output)
        elif isinstance(report, Checked):
            asked = self._checks.pop(0)
            asked.set_exception(report.error) if report.error else asked.set_result(None)
        else:
            self._come_to_the_end(report)

    def _come_to_the_end(self, report: Ended) -> None:
        error = report.error if isinstance(report.error, EngineError) else EngineError(str(report.error))
        self._end = self._end or error
        for mailbox in list(self._mailboxes.values()):
            mailbox.call(mailbox.fail, self._end)
        for asked in self._checks:
            asked.set_exception(self._end)
        self._ended.set_result(self._end)


def joined(deltas: Sequence[RequestOutput]) -> RequestOutput:
    """Deltas of one request, in order, as one."""
    answers = tuple(map(_joined_answer, zip(*(delta.outputs for delta in deltas), strict=True)))
    return replace(deltas[-1], prompt_token_ids=deltas[0].prompt_token_ids, outputs=answers)


def _joined_answer(deltas: tuple[CompletionOutput, ...]) -> CompletionOutput:
    logprobs = None
    if deltas[0].logprobs is not None:
        logprobs = tuple(entry for delta in deltas for entry in delta.logprobs or ())
    return replace(
        deltas[-1],
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token_id for delta in deltas for token_id in delta.token_ids),
        logprobs=logprobs,
    )
