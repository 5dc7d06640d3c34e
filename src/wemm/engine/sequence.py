"""A request behind the door, and the sequences (one per answer) it is computed as."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from wemm.engine.output import Answer
from wemm.processing.processor import ImageSpan, ProcessedPrompt
from wemm.request import Logprob, RequestMetrics, SamplingParams


@dataclass(frozen=True)
class Request:
    """A valid request: nothing behind the door checks it again."""

    request_id: str
    prompt: ProcessedPrompt
    sampling_params: SamplingParams
    seed: int
    arrival_time: float
    """time.perf_counter() when the caller handed it in, before processing."""
    metrics: RequestMetrics = field(default_factory=RequestMetrics)


@dataclass(eq=False)
class Sequence:
    """One growing answer: prompt and answer tokens, and how many of them are computed."""

    seq_id: str
    request: Request
    index: int
    """Which of the request's n answers this is."""
    generator: np.random.Generator
    """Draws this answer's random numbers and nobody else's."""
    answer: Answer
    num_computed_tokens: int = 0
    output_token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    cumulative_logprob: float = 0.0

    @property
    def params(self) -> SamplingParams:
        """How the answer is drawn."""
        return self.request.sampling_params

    @property
    def image_spans(self) -> tuple[ImageSpan, ...]:
        """Images of the prompt."""
        return self.request.prompt.image_spans

    @property
    def num_tokens(self) -> int:
        """Prompt and answer so far."""
        return len(self.request.prompt.token_ids) + len(self.output_token_ids)

    def tokens(self, start: int, stop: int) -> list[int]:
        """Tokens [start, stop) of prompt and answer."""
        prompt = self.request.prompt.token_ids
        inside_prompt = list(prompt[start:stop])
        return inside_prompt + self.output_token_ids[max(start - len(prompt), 0) : max(stop - len(prompt), 0)]
