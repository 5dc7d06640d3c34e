"""Keeps an engine alive: start it, warm it up, and start it again if it dies, a bounded number of times."""

from __future__ import annotations

import asyncio
import io
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress

from PIL import Image

from wemm.engine.async_llm import AsyncLLM
from wemm.engine.engine import EngineStats
from wemm.errors import ClientError, EngineDeadError, WemmError
from wemm.request import SamplingParams

logger = logging.getLogger(__name__)

_RESTART_WINDOW = 600.0


class EngineSupervisor:
    """The engine of a service, if it has one at the moment."""

    def __init__(self, start: Callable[[], AsyncLLM], max_restarts: int, warm_up: bool) -> None:
        """`start` blocks until an engine is up."""
        self._start = start
        self._max_restarts = max_restarts
        self._warm_up = warm_up
        self._llm: AsyncLLM | None = None
        self._ready = False
        self._deaths: deque[float] = deque()
        self._why_not = "the model is being loaded"
        self.num_restarts = 0
        self.has_given_up = False
        """Whether no engine will be started again."""

    @property
    def is_ready(self) -> bool:
        """Whether requests are answered now."""
        return self._ready

    @property
    def why_not_ready(self) -> str:
        """What to tell callers meanwhile."""
        return self._why_not

    @property
    def llm(self) -> AsyncLLM:
        """The engine. Raises EngineDeadError while there is none that answers."""
        if self._llm is None or not self.is_ready:
            raise EngineDeadError(self._why_not)
        return self._llm

    @property
    def stats(self) -> EngineStats | None:
        """Of the engine; None while there is none."""
        try:
            return self._llm.stats if self._llm is not None else None
        except WemmError:
            return None

    async def start(self) -> None:
        """Load the model. Raises what `AsyncLLM` raises: a mistake must end the service, not be tried again."""
        self._llm = await _in_daemon_thread(self._start)

    async def run(self) -> None:
        """Warm up and watch the started engine, and those after it; returns when one more must not be tried."""
        while self._llm is not None:
            try:
                await self._until_it_ends(self._llm)
            finally:
                self._ready = False
                llm, self._llm = self._llm, None
                await asyncio.shield(llm.close())
            await self._restart()

    async def _restart(self) -> None:
        """Another engine, or none if there were enough. One that does not come up counts like one that died."""
        while self._may_restart():
            self._why_not = "the engine died and is being started again"
            self.num_restarts += 1
            try:
                await self.start()
                return
            except WemmError as error:
                logger.error("the engine could not be started again: %s", error)
        self.has_given_up = True
        self._why_not = f"the engine died {self._max_restarts + 1} times; restart the service"
        logger.error(self._why_not)

    async def _until_it_ends(self, llm: AsyncLLM) -> None:
        ended = asyncio.create_task(llm.wait_until_ended())
        try:
            if self._warm_up:
                self._why_not = "the engine is warming up"
                warming = asyncio.create_task(_answer_largest_image(llm))
                await asyncio.wait({warming, ended}, return_when=asyncio.FIRST_COMPLETED)
                if not warming.done():
                    warming.cancel()
                elif warming.exception() is not None:
                    self._why_not = f"the warm-up failed: {warming.exception()}"
                    logger.error(self._why_not)
                    return
            if not ended.done():
                self._ready = True
                logger.info("ready")
            error = await ended
            logger.error("the engine has ended: %s", error)
        finally:
            ended.cancel()

    def _may_restart(self) -> bool:
        now = time.monotonic()
        self._deaths.append(now)
        while now - self._deaths[0] > _RESTART_WINDOW:
            self._deaths.popleft()
        return len(self._deaths) <= self._max_restarts


async def _in_daemon_thread(call: Callable[[], AsyncLLM]) -> AsyncLLM:
    # A service that is stopped while it loads does not wait until it has loaded.
    future: Future[AsyncLLM] = Future()

    def run() -> None:
        try:
            llm = call()
        except BaseException as error:  # noqa: BLE001 - told to whoever waits
            with suppress(InvalidStateError):
                future.set_exception(error)
            return
        try:
            future.set_result(llm)
        except InvalidStateError:  # nobody waits any more
            asyncio.run(llm.close())

    threading.Thread(target=run, name="wemm-start", daemon=True).start()
    return await asyncio.wrap_future(future)


async def _answer_largest_image(llm: AsyncLLM) -> None:
    """One real inference at real resolution: the model resizes any square to its largest."""
    picture = io.BytesIO()
    Image.effect_noise((64, 64), 100).convert("RGB").save(picture, "PNG")
    content = [{"type": "image", "image": picture.getvalue()}, {"type": "text", "text": "?"}]
    params = SamplingParams(max_tokens=2, ignore_eos=True)
    try:
        async for _ in llm.chat([{"role": "user", "content": content}], params):
            pass
    except ClientError:
        # The largest image does not fit into max_model_len: what fits, then.
        async for _ in llm.chat([{"role": "user", "content": "?"}], params):
            pass
