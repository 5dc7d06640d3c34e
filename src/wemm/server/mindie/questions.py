"""Bodies → questions: names translated, and what the engine cannot do refused."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from wemm.engine.intake import Process
from wemm.errors import ParameterError
from wemm.processing.processor import Processor
from wemm.processing.tokenizer import Tokenizer
from wemm.request import SamplingParams
from wemm.server.mindie.prompt import Prompt
from wemm.server.mindie.protocol import (
    DEFAULT_PRIORITY,
    InputTensor,
    Parameters,
    Sampling,
    TensorRequest,
    TgiParameters,
    VllmRequest,
)
from wemm.server.service import Question

_DEFAULT_MAX_NEW_TOKENS = 20
_DEFAULT_TEMPERATURE = 1.0
_SAME_NAME = (
    "top_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "stop", "stop_token_ids", "ignore_eos",
    "skip_special_tokens",
)  # fmt: skip
_NONE_MEANT = ("", "None")
_NEUTRAL: Mapping[str, tuple[Any, str]] = {
    "typical_p": (1, "use top_p"),
    "watermark": (False, "answers carry none"),
    "perf_stat": (False, "/metrics has the figures"),
    "best_of": (1, "one answer is drawn"),
    "top_n_tokens": (0, "the OpenAI routes know top_logprobs"),
    "grammar": (None, "the OpenAI routes know response_format"),
    "use_beam_search": (False, "answers are drawn or greedy"),
    "logprobs": (False, "the OpenAI routes know logprobs"),
}
"""Fields that may only say what is so anyway, and what to do instead."""


def text_question(
    prompt: Prompt, parameters: Parameters | None, default: SamplingParams, wants_logprobs: bool = False
) -> Question:
    """Of TGI, Triton and MindIE's own text bodies. Raises ParameterError."""
    return _question(prompt.source, parameters, default, wants_logprobs)


def tgi_question(
    prompt: Prompt, parameters: TgiParameters, default: SamplingParams, tokenizer: Tokenizer, stream: bool
) -> Question:
    """Of TGI's. Raises ParameterError."""
    if parameters.adapter_id not in (None, *_NONE_MEANT):
        raise ParameterError(f"adapter_id {parameters.adapter_id!r}: there are no adapters here", "adapter_id")
    if parameters.decoder_input_details and stream:
        raise ParameterError("decoder_input_details cannot be streamed", "decoder_input_details")
    for name in ("decoder_input_details", "truncate"):
        if getattr(parameters, name) and prompt.has_images:
            raise ParameterError(f"{name} is for text alone: an image is no list of tokens", name)
    question = text_question(prompt, parameters, default, wants_logprobs=stream or bool(parameters.details))
    if parameters.truncate is None:
        return question
    if not isinstance(prompt.source, str):
        raise ParameterError("truncate is for raw text; it would cut the frame of a question", "truncate")
    return replace(question, process=_truncation(tokenizer, parameters.truncate))


def token_question(token_ids: list[int], parameters: Parameters | None, default: SamplingParams) -> Question:
    """Of token ids as they are. Raises ParameterError."""
    return _question(token_ids, parameters, default, False)


def tensor_question(body: TensorRequest, default: SamplingParams) -> Question:
    """Of Triton's tensor form. Raises ParameterError."""
    [tensor] = body.inputs
    _check_shape(tensor)
    if tensor.parameters is not None and body.parameters is not None:
        raise ParameterError("parameters stand either in inputs[0] or beside inputs, not in both", "parameters")
    return _question(tensor.data, tensor.parameters or body.parameters, default, False)


def vllm_question(body: VllmRequest, prompt: Prompt, default: SamplingParams, room: int) -> Question:
    """Of vLLM's. `room`: what max_tokens means if it is not given. Raises ParameterError."""
    n = body.n if body.n is not None else body.best_of or 1
    best_of = body.best_of if body.best_of is not None else n
    if best_of < n:
        raise ParameterError(f"best_of must be at least n. Given: best_of {best_of}, n {n}", "best_of")
    if best_of > n and body.stream:
        raise ParameterError("best_of above n cannot be streamed: which is best is known at the end", "best_of")
    _refuse_what_cannot_be_done(body, {name: rule for name, rule in _NEUTRAL.items() if name != "best_of"})
    does_sample = _says_how_to_draw(body) and body.temperature != 0
    if best_of > 1 and not does_sample:
        raise ParameterError("n and best_of above 1 need a temperature above 0: greedy answers are all one", "n")
    params = _params(body, default, does_sample, room if body.max_tokens is None else body.max_tokens)
    params = replace(params, n=best_of, logprobs=0 if best_of > n else None)
    return Question(prompt.source, params, *_order(body))


def _question(
    prompt: Any, parameters: Parameters | None, default: SamplingParams, wants_logprobs: bool
) -> Question:
    parameters = parameters or Parameters.model_validate({})
    _refuse_what_cannot_be_done(parameters, _NEUTRAL)
    does_sample = _says_how_to_draw(parameters) if parameters.do_sample is None else parameters.do_sample
    max_tokens = parameters.max_new_tokens or _DEFAULT_MAX_NEW_TOKENS
    params = _params(parameters, default, does_sample, max_tokens)
    if wants_logprobs:
        params = replace(params, logprobs=0)
    return Question(prompt, params, *_order(parameters))


def _says_how_to_draw(body: Sampling) -> bool:
    return any(value is not None for value in (body.temperature, body.top_k, body.top_p))


def _params(body: Sampling, default: SamplingParams, does_sample: bool, max_tokens: int) -> SamplingParams:
    given = {name: value for name in _SAME_NAME if (value := getattr(body, name, None)) is not None}
    if body.top_k is not None:
        given["top_k"] = body.top_k
    temperature = body.temperature if body.temperature is not None else _DEFAULT_TEMPERATURE
    return replace(
        default,
        **given,
        temperature=temperature if does_sample else 0.0,
        seed=body.seed if body.seed is not None else secrets.randbelow(2**63),
        max_tokens=max_tokens,
    )


def _order(body: Sampling) -> tuple[int, float | None]:
    # 1 to 5 go before requests of other dialects or beside them, never behind: those say 0 where these say 5.
    priority = (body.priority or DEFAULT_PRIORITY) - DEFAULT_PRIORITY
    return priority, None if body.timeout is None else float(body.timeout)


def _refuse_what_cannot_be_done(body: Sampling, neutral: Mapping[str, tuple[Any, str]]) -> None:
    for name, (value, remedy) in neutral.items():
        given = getattr(body, name, None)
        if given is not None and given != value:
            raise ParameterError(f"{name} {str(given)[:100]} is not supported: {remedy}", name)


def _check_shape(tensor: InputTensor) -> None:
    rows, length = [1, *tensor.shape][-2:]
    if rows != 1 or length != len(tensor.data):
        raise ParameterError(
            f"inputs[0].shape must be [{len(tensor.data)}] or [1, {len(tensor.data)}], as long as its data. "
            f"Given: {tensor.shape}",
            "inputs[0].shape",
        )


def _truncation(tokenizer: Tokenizer, num_tokens: int) -> Callable[[Processor], Process]:
    """How a text becomes its last tokens, BOS among them."""

    def bind(processor: Processor) -> Process:
        def process(text: str) -> Any:
            token_ids = tokenizer.encode(text)
            kept = token_ids[max(0, len(token_ids) - num_tokens + 1) :]
            return processor.token_ids([tokenizer.bos_id, *kept])

        return process

    return bind
