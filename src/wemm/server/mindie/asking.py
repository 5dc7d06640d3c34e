"""From a body's prompt to the engine's outputs: what the routes of all dialects do alike."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from fastapi import Request

from wemm.errors import ClientError
from wemm.server.context import context_of
from wemm.server.mindie.answers import Outputs
from wemm.server.mindie.prompt import Prompt, read_prompt
from wemm.server.mindie.running import RunningRequests, until_stopped
from wemm.server.openai.protocol import Part
from wemm.server.service import Generation, Question, Service

_LARGE = 2**18  # characters or tokens, worth a thread
_CONTENT = "messages[0].content"

Result = TypeVar("Result")


class Asker:
    """Asks one service, and knows what it is answering to whom."""

    def __init__(self, service: Service) -> None:
        self.running = RunningRequests()
        self._service = service

    async def ask(self, question: Question, request: Request, param: str) -> Outputs:
        """Deltas. Raises ClientError, which calls the prompt by its name in the body, `param`."""
        return until_stopped(await self._begin(question, request, param), asyncio.Event())

    async def ask_by_id(self, question: Question, request: Request, param: str, request_id: str) -> Outputs:
        """Deltas until the end, or until the caller stops the request by this id."""
        context = context_of(request.scope)
        stop = context.resources.enter_context(self.running.enter(context.caller, request_id))
        return until_stopped(await self._begin(question, request, param), stop)

    async def count(self, prompt: Prompt, request: Request, param: str) -> tuple[int, ...]:
        """The prompt's token ids as the model would see them."""
        question = Question(prompt.source, self._service.llm.default_sampling_params)
        with _calling_it(param):
            processed = await self._service.count(question, context_of(request.scope))
        return processed.token_ids

    async def _begin(self, question: Question, request: Request, param: str) -> Generation:
        with _calling_it(param):
            return await self._service.begin(question, context_of(request.scope))


async def read(given: str | Sequence[Part], param: str) -> Prompt:
    """A body's prompt. Raises ParameterError."""
    size = len(given) if isinstance(given, str) else 0
    return await off_loop(size, lambda: read_prompt(given, param))


async def off_loop(size: int, work: Callable[[], Result]) -> Result:
    """Do it in a thread if there is much of it."""
    return await asyncio.to_thread(work) if size > _LARGE else work()


@contextmanager
def _calling_it(param: str) -> Iterator[None]:
    # Below the dialects every prompt with images is a message.
    try:
        yield
    except ClientError as error:
        if _CONTENT not in str(error):
            raise
        raise type(error)(str(error).replace(_CONTENT, param), param) from None
