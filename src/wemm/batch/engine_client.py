"""Answers from the engine in this process, all questions batched continuously."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import asdict
from itertools import tee

from wemm.batch.question import Answer, Question
from wemm.engine.llm import LLM
from wemm.request import RequestOutput


class EngineClient:
    """Asks an LLM."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm

    @property
    def model(self) -> str:
        """As it was loaded."""
        return self._llm.config.model

    def answers(self, questions: Iterable[Question]) -> Generator[tuple[int, Answer], None, None]:
        """See `Client`. Raises RankError."""
        asked, again = tee(questions)
        completed = self._llm.chat_as_completed((q.messages for q in asked), (q.sampling for q in again))
        for place, output in completed:
            yield place, _answer(output)


def _answer(output: RequestOutput) -> Answer:
    if output.error is not None:
        return Answer.failed(output.error)
    completion = output.outputs[0]
    return Answer(
        text=completion.text,
        finish_reason=completion.finish_reason,
        token_ids=completion.token_ids,
        prompt_tokens=len(output.prompt_token_ids),
        image_tokens=output.num_image_tokens,
        cached_tokens=output.num_cached_tokens,
        completion_tokens=len(completion.token_ids),
        seconds=round(output.metrics.total, 6),
        timings={name: round(seconds, 6) for name, seconds in asdict(output.metrics).items()},
    )
