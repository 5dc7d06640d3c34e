"""What a caller asks and gets: SamplingParams in, RequestOutput out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from wemm.config import option
from wemm.errors import ParameterError, WemmError

SMALLEST = 1e-6
"""Least temperature above 0, top_p and repetition penalty: smaller ones vanish in float32."""
MAX_LOGPROBS = 20
MAX_N = 128
MAX_STOP_STRINGS = 64
MAX_STOP_LEN = 1024
MAX_LOGIT_BIAS = 1024
_INT32_MAX = 2**31 - 1
_UINT64_MAX = 2**64 - 1


def _check_number(name: str, value: Any, low: float, high: float, param: str | None = None) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:  # false for NaN
        raise ParameterError(
            f"{name} must be a finite number in [{low:g}, {high:g}]. Given: {value!r}", param or name
        )


def _check_integer(name: str, value: Any, low: int, high: int, param: str | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ParameterError(f"{name} must be an integer in [{low}, {high}]. Given: {value!r}", param or name)


def _as_tuple(name: str, value: Any, kind: type) -> tuple[Any, ...]:
    items = (value,) if isinstance(value, kind) else value
    if items is None:
        return ()
    wrong = not isinstance(items, Sequence) or isinstance(items, str)
    if wrong or any(not isinstance(item, kind) or isinstance(item, bool) for item in items):
        raise ParameterError(f"{name} must be a list of {kind.__name__}. Given: {value!r}", name)
    return tuple(items)


@dataclass(frozen=True)
class StructuredOutputsParams:
    """What the answer must be; exactly one is given. Names follow vLLM."""

    json: Mapping[str, Any] | str | None = None
    """A JSON schema."""
    regex: str | None = None
    """A regular expression that the whole answer matches."""
    choice: Sequence[str] | None = None
    """The answer is one of these."""
    json_object: bool = False
    """Any JSON object."""

    def __post_init__(self) -> None:
        given = [name for name in ("json", "regex", "choice", "json_object") if getattr(self, name)]
        if len(given) != 1:
            raise ParameterError(
                "structured_outputs takes exactly one of json, regex, choice, json_object. "
                f"Given: {given or 'none'}",
                "structured_outputs",
            )
        if self.json is not None and not isinstance(self.json, (Mapping, str)):
            raise ParameterError(
                f"structured_outputs.json must be a JSON schema. Given: {self.json!r}", "structured_outputs"
            )
        if self.regex is not None and not isinstance(self.regex, str):
            raise ParameterError(
                f"structured_outputs.regex must be text. Given: {self.regex!r}", "structured_outputs"
            )
        if self.choice is not None and "" in _as_tuple("structured_outputs.choice", self.choice, str):
            raise ParameterError("structured_outputs.choice must not be empty text", "structured_outputs")

    @property
    def kind(self) -> str:
        """The field that is given."""
        return next(name for name in ("json", "regex", "choice", "json_object") if getattr(self, name))


@dataclass(frozen=True)
class SamplingParams:
    """How the answer is drawn. Names and meanings follow vLLM; the default is greedy.

    Every value is checked at construction; ParameterError names the value and the rule.
    """

    n: int = option(1, "Answers drawn independently for the prompt.")
    temperature: float = option(0.0, "0 is greedy: the most probable token, always.")
    top_p: float = option(1.0, "Keep the smallest set of tokens that sum to this, equals of the last included.")
    top_k: int = option(0, "Keep this many tokens; 0 or -1 keeps all.")
    min_p: float = option(0.0, "Drop tokens less probable than this share of the most probable one.")
    repetition_penalty: float = option(
        1.0, "Divides (multiplies) positive (negative) logits of tokens seen in prompt or answer."
    )
    presence_penalty: float = option(0.0, "Subtracted once from the logit of every token of the answer so far.")
    frequency_penalty: float = option(
        0.0, "Subtracted per occurrence from the logit of every token of the answer so far."
    )
    seed: int | None = option(None, "Same seed, same answer, whatever else is computed beside it.")
    stop: Sequence[str] | str | None = option(None, "The answer ends before the first of these strings.")
    stop_token_ids: Sequence[int] | None = option(
        None, "The answer ends at one of these tokens, besides the model's own end token."
    )
    max_tokens: int = option(256, "Tokens of the answer at most; also bounded by what max_model_len leaves.")
    min_tokens: int = option(
        0, "The answer does not end by a token or stop string before it has this many tokens."
    )
    logit_bias: Mapping[int, float] | None = option(
        None, "Added to the logits of these token ids; -100 as good as forbids one, 100 forces it."
    )
    repetition_guard: bool = option(
        True,
        "End an answer that goes round in circles (a cycle of up to 128 tokens, 8 times and 256 tokens over) "
        'with finish_reason "repetition".',
    )
    ignore_eos: bool = option(False, "Go on after the model's own end token.")
    logprobs: int | None = option(
        None, "Return the log probabilities of this many most probable tokens, and of the chosen one."
    )
    skip_special_tokens: bool = option(True, "Leave control tokens out of the text.")
    structured_outputs: StructuredOutputsParams | None = field(
        default=None,
        metadata={"help": "Hold the answer to a JSON schema, a regular expression or a list of choices."},
    )

    def __post_init__(self) -> None:
        _check_integer("n", self.n, 1, MAX_N)
        _check_number("temperature", self.temperature, 0, 1e4)
        if 0 < self.temperature < SMALLEST:
            problem = f"temperature must be 0 or at least {SMALLEST:g}. Given: {self.temperature!r}"
            raise ParameterError(problem, "temperature")
        _check_number("top_p", self.top_p, SMALLEST, 1)
        _check_integer("top_k", self.top_k, -1, _INT32_MAX)
        _check_number("min_p", self.min_p, 0, 1)
        _check_number("repetition_penalty", self.repetition_penalty, SMALLEST, 1e4)
        _check_number("presence_penalty", self.presence_penalty, -2, 2)
        _check_number("frequency_penalty", self.frequency_penalty, -2, 2)
        _check_integer("max_tokens", self.max_tokens, 1, _INT32_MAX)
        if self.seed is not None:
            _check_integer("seed", self.seed, 0, _UINT64_MAX)
        if self.logprobs is not None:
            _check_integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        _check_integer("min_tokens", self.min_tokens, 0, self.max_tokens)
        self._check_logit_bias()
        for name in ("ignore_eos", "skip_special_tokens", "repetition_guard"):
            if not isinstance(getattr(self, name), bool):
                raise ParameterError(f"{name} must be true or false. Given: {getattr(self, name)!r}", name)
        if self.structured_outputs is not None:
            self._check_structured_outputs()
        object.__setattr__(self, "stop", _as_tuple("stop", self.stop, str))
        object.__setattr__(self, "stop_token_ids", _as_tuple("stop_token_ids", self.stop_token_ids, int))
        if len(self.stop_strings) > MAX_STOP_STRINGS:
            problem = f"stop takes at most {MAX_STOP_STRINGS} strings. Given: {len(self.stop_strings)}"
            raise ParameterError(problem, "stop")
        for text in self.stop_strings:
            if not 1 <= len(text) <= MAX_STOP_LEN:
                problem = f"a stop string has 1 to {MAX_STOP_LEN} characters. Given: {len(text)}"
                raise ParameterError(problem, "stop")

    def _check_structured_outputs(self) -> None:
        if not isinstance(self.structured_outputs, StructuredOutputsParams):
            raise ParameterError(
                f"structured_outputs must be StructuredOutputsParams. Given: {self.structured_outputs!r}"
            )
        for name in ("ignore_eos", "min_tokens"):
            if getattr(self, name):
                problem = f"{name} cannot be kept where structured_outputs says when an answer ends"
                raise ParameterError(problem, name)

    def _check_logit_bias(self) -> None:
        bias = self.logit_bias
        if bias is not None and not isinstance(bias, Mapping):
            raise ParameterError(f"logit_bias must map token ids to numbers. Given: {bias!r}", "logit_bias")
        if len(self.biases) > MAX_LOGIT_BIAS:
            problem = f"logit_bias takes at most {MAX_LOGIT_BIAS} tokens. Given: {len(self.biases)}"
            raise ParameterError(problem, "logit_bias")
        for token_id, value in self.biases.items():
            _check_integer("a token id of logit_bias", token_id, 0, _INT32_MAX, "logit_bias")
            _check_number(f"logit_bias of token {token_id}", value, -100, 100, "logit_bias")

    @property
    def biases(self) -> Mapping[int, float]:
        """`logit_bias`, empty if there is none."""
        return self.logit_bias or {}

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as it was checked."""
        return tuple(self.stop or ())

    @property
    def greedy(self) -> bool:
        """True if no random draw is needed."""
        return self.temperature == 0


@dataclass(frozen=True)
class BeamSearchParams:
    """How beam search looks for the most probable answers. Names follow vLLM."""

    beam_width: int
    max_tokens: int = 256
    ignore_eos: bool = False
    length_penalty: float = 1.0
    """Answers are ranked by log probability / length ** length_penalty."""

    def __post_init__(self) -> None:
        _check_integer("beam_width", self.beam_width, 1, MAX_LOGPROBS // 2)
        _check_integer("max_tokens", self.max_tokens, 1, _INT32_MAX)
        _check_number("length_penalty", self.length_penalty, -10, 10)


@dataclass(frozen=True)
class Logprob:
    """One candidate token: natural log probability, rank (1 is the most probable), its text."""

    logprob: float
    rank: int
    decoded_token: str


@dataclass(frozen=True)
class CompletionOutput:
    """One answer, complete or so far."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    cumulative_logprob: float | None
    logprobs: tuple[dict[int, Logprob], ...] | None
    finish_reason: str | None
    """"stop", "length" or "repetition"; None while the answer grows."""
    stop_reason: int | str | None = None
    """The stop token id or stop string that ended it, if it was not the model's own end token."""


@dataclass
class RequestMetrics:
    """Seconds spent per stage of one request; stages shared with other requests count in full."""

    processing: float = 0.0
    """Reading, resizing and tokenising the prompt."""
    queue: float = 0.0
    """From arrival to the first computed step."""
    vision: float = 0.0
    """Vision tower and downsampler."""
    prefill: float = 0.0
    """Prompt tokens through the language model."""
    decode: float = 0.0
    """All answer tokens after the first."""
    first_token: float = 0.0
    """From arrival to the first answer token."""
    total: float = 0.0
    """From arrival to the last answer token."""


@dataclass(frozen=True)
class RequestOutput:
    """The state of one request after a step; final when `finished`."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    """Image positions hold IMAGE_TOKEN_ID (-200)."""
    outputs: tuple[CompletionOutput, ...]
    finished: bool
    num_image_tokens: int = 0
    """Prompt positions that come from images, separator rows included."""
    num_cached_tokens: int = 0
    """Prompt positions that needed no computing: the prefix cache had them."""
    metrics: RequestMetrics = field(default_factory=RequestMetrics)
    error: WemmError | None = None
    """Why the engine gave the request up; its outputs are then incomplete."""
