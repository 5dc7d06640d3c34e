"""AsyncLLM: the door for servers. Many callers on an event loop, one engine in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from wemm.config import EngineConfig, engine_config
from wemm.engine.build import BuiltEngine, build_engine
from wemm.engine.engine import Engine, EngineStats
from wemm.engine.intake import Intake, Process, process_text_or_ids
from wemm.engine.sequence import Request
from wemm.errors import EngineError
from wemm.processing.chat_template import Message
from wemm.progress import ProgressBar, silent
from wemm.request import RequestOutput, SamplingParams

logger = logging.getLogger(__name__)


class _Mailbox:
    """The newest state of one request, from the engine's thread to the caller's event loop.

    Only the newest: it holds all that came before, so a slow caller costs no memory.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._state: RequestOutput | EngineError | None = None

    def put(self, state: RequestOutput | EngineError) -> None:
        """From any thread."""
        self._state = state
        with contextlib.suppress(RuntimeError):  # the caller's loop is closed: nobody waits
            self._loop.call_soon_threadsafe(self._news.set)

    async def get(self) -> RequestOutput:
        """The next state. Raises EngineError if the engine has come to its end."""
        await self._news.wait()
        self._news.clear()
        state = self._state
        assert state is not None
        if isinstance(state, EngineError):
            raise state
        return state


class AsyncLLM:
    """A loaded model that answers many at once.

        llm = AsyncLLM("nano")
        async for output in llm.chat(messages, SamplingParams(max_tokens=64)):
            print(output.outputs[0].text, end="")

    Every output holds what is new since the one before: text, token ids and log probabilities. Leaving the
    iteration, or cancelling its task, aborts the request. Options are those of `LLM`. Raises what `LLM` raises.
    """

    def __init__(self, model: str | Path, *, progress: ProgressBar = silent, **options: Any) -> None:
        self.config: EngineConfig = engine_config(model, options)
        self._built: BuiltEngine | None = build_engine(self.config, progress)
        self._intake = Intake(self._built, self.config.seed)
        self._orders: queue.SimpleQueue[Callable[[Engine], None] | None] = queue.SimpleQueue()
        self._mailboxes: dict[str, _Mailbox] = {}
        self._end: EngineError | None = None
        self._thread = threading.Thread(
            target=self._work, args=(self._built.engine,), name="wemm-engine", daemon=True
        )
        self._thread.start()

    def chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Answer one conversation (see `LLM.chat`), in deltas; the last output is `finished`."""
        process = self._open.processor.chat
        return self._answer(partial(self._intake.submit, messages, process, sampling_params, priority, timeout))

    def generate(
        self,
        prompt: str | Sequence[int],
        sampling_params: SamplingParams | None = None,
        *,
        priority: int = 0,
        timeout: float | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Continue raw text or token ids (see `LLM.generate`), in deltas."""
        process: Process = process_text_or_ids(self._open)
        return self._answer(partial(self._intake.submit, prompt, process, sampling_params, priority, timeout))

    @property
    def stats(self) -> EngineStats:
        """What the engine holds and has done, read beside its thread."""
        return self._open.engine.stats

    async def close(self) -> None:
        """End the engine; requests under way raise EngineError."""
        if self._built is not None:
            self._built = None
            self._intake.close()
            self._orders.put(None)
            await asyncio.to_thread(self._thread.join)

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    @property
    def _open(self) -> BuiltEngine:
        if self._end is not None:
            raise self._end
        if self._built is None:
            raise EngineError("this AsyncLLM is closed")
        return self._built

    async def _answer(self, submit: Callable[[], Future[Request]]) -> AsyncIterator[RequestOutput]:
        request = await asyncio.wrap_future(submit())
        mailbox = self._mailboxes[request.request_id] = _Mailbox()
        self._orders.put(lambda engine: engine.add_request(request))
        if self._end is not None:
            mailbox.put(self._end)
        seen: RequestOutput | None = None
        try:
            while seen is None or not seen.finished:
                output = await mailbox.get()
                if output.error is not None:
                    raise output.error
                yield _delta(output, seen)
                seen = output
        finally:
            del self._mailboxes[request.request_id]
            self._orders.put(lambda engine: engine.abort(request.request_id))

    def _work(self, engine: Engine) -> None:
        """The engine's thread: take orders, step while there is work, sleep while there is none."""
        try:
            while self._take_orders(engine):
                for output in engine.step():
                    mailbox = self._mailboxes.get(output.request_id)
                    if mailbox is not None:
                        mailbox.put(output)
            self._end = EngineError("this AsyncLLM is closed")
        except Exception as error:  # whatever ends the engine, every caller must hear of it
            logger.exception("the engine has come to its end")
            self._end = error if isinstance(error, EngineError) else EngineError(f"the engine failed: {error!r}")
        finally:
            engine.close()
            for mailbox in list(self._mailboxes.values()):
                mailbox.put(self._end or EngineError("the engine was interrupted"))

    def _take_orders(self, engine: Engine) -> bool:
        """Everything that was ordered; waits for an order if there is nothing to do. False: the end."""
        while not self._orders.empty() or not engine.num_unfinished:
            order = self._orders.get()
            if order is None:
                return False
            order(engine)
        return True


def _delta(output: RequestOutput, seen: RequestOutput | None) -> RequestOutput:
    if seen is None:
        return output
    outputs = []
    for now, before in zip(output.outputs, seen.outputs, strict=True):
        count = len(before.token_ids)
        logprobs = None if now.logprobs is None else now.logprobs[count:]
        text, token_ids = now.text[len(before.text) :], now.token_ids[count:]
        outputs.append(replace(now, text=text, token_ids=token_ids, logprobs=logprobs))
    return replace(output, outputs=tuple(outputs))
