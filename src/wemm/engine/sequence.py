"""A request behind the door, and the sequences (one per answer) it is computed as."""

from __future__ import annotations

from dataclasses import dataclass, field

from wemm.engine.output import Answer
from wemm.engine.speculation import Speculator
from wemm.engine.structured import Grammar, GrammarWalk
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
    priority: int = 0
    """Smaller goes first."""
    deadline: float | None = None
    """time.perf_counter() after which it is given up."""
    grammar: Grammar | None = None
    """What its answers must follow."""
    metrics: RequestMetrics = field(default_factory=RequestMetrics)


@dataclass(eq=False)
class Sequence:
    """One growing answer: prompt and answer tokens, and how many of them are computed."""

    seq_id: str
    request: Request
    index: int
    """Which of the request's n answers this is."""
    answer: Answer
    speculator: Speculator
    grammar: GrammarWalk | None = None
    num_computed_tokens: int = 0
    """Those of steps that the device has not finished included."""
    num_pending_tokens: int = 0
    """Tokens of the answer that such steps draw: counted, but not known here yet."""
    num_cached_tokens: int | None = None
    """Of the prompt, found in the prefix cache when it first ran; None before."""
    output_token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    block_hashes: list[bytes] = field(default_factory=list)
    """Of its full blocks; grown and read by the KV cache."""

    @property
    def params(self) -> SamplingParams:
        """How the answer is drawn."""
        return self.request.sampling_params

    @property
    def image_spans(self) -> tuple[ImageSpan, ...]:
        """Images of the prompt."""
        return self.request.prompt.image_spans

    @property
    def num_known_tokens(self) -> int:
        """Prompt and answer as far as it is known."""
        return len(self.request.prompt.token_ids) + len(self.output_token_ids)

    @property
    def num_tokens(self) -> int:
        """Prompt and answer so far."""
        return self.num_known_tokens + self.num_pending_tokens

    @property
    def num_tokens_left(self) -> int:
        """Tokens that still may be drawn."""
        return self.answer.num_tokens_left - self.num_pending_tokens

    @property
    def is_decoding(self) -> bool:
        """All tokens but the newest are computed, and that is one of the answer."""
        num_computed = self.num_computed_tokens
        return len(self.request.prompt.token_ids) <= num_computed == self.num_tokens - 1

    @property
    def waits_for_its_tokens(self) -> bool:
        """What may come next depends on all tokens that came: a grammar is walked here, not on the device."""
        return self.grammar is not None

    def tokens(self, start: int, stop: int) -> list[int]:
        """Tokens [start, stop) of prompt and answer, as far as they are known."""
        prompt = self.request.prompt.token_ids
        inside_prompt = list(prompt[start:stop])
        return inside_prompt + self.output_token_ids[max(start - len(prompt), 0) : max(stop - len(prompt), 0)]

    def images_needed(self, start: int) -> list[ImageSpan]:
        """Images with a position at `start` or later, in order."""
        return [span for span in self.image_spans if span.stop > start]
