"""OpenAI bodies → questions: names translated, ranges checked where the engine checks them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from wemm.errors import ParameterError
from wemm.request import MAX_LOGPROBS, SamplingParams, StructuredOutputsParams
from wemm.server.openai.grammar_limits import check_grammar_size
from wemm.server.openai.protocol import ChatCompletionRequest, ChatMessage, CompletionRequest, Sampling
from wemm.server.service import Question

_SAME_NAME = (
    "temperature", "top_p", "n", "stop", "presence_penalty", "frequency_penalty", "top_k", "min_p",
    "repetition_penalty", "min_tokens", "stop_token_ids", "ignore_eos", "skip_special_tokens", "repetition_guard",
)  # fmt: skip
_UINT64 = 2**64
_COMPLETIONS_MAX_TOKENS = 16


def chat_question(body: ChatCompletionRequest, default: SamplingParams, room: int) -> Question:
    """`room`: what max_tokens means if it is not given. Raises ParameterError."""
    if body.tools:
        raise ParameterError("tools are not supported: the model was not trained to call any", "tools")
    if body.top_logprobs is not None and not body.logprobs:
        raise ParameterError("top_logprobs needs logprobs: true", "top_logprobs")
    max_tokens = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    params = _params(body, default, room if max_tokens is None else max_tokens)
    if body.logprobs:
        params = replace(params, logprobs=body.top_logprobs or 0)
    return Question(messages(body.messages), params, body.priority or 0, body.timeout)


def completion_questions(body: CompletionRequest, default: SamplingParams) -> list[Question]:
    """One per prompt. Raises ParameterError."""
    if body.suffix:
        raise ParameterError("suffix is not supported: the model only continues", "suffix")
    n = body.n if body.n is not None else 1
    if body.best_of is not None and body.best_of < n:
        raise ParameterError(f"best_of must be at least n. Given: best_of {body.best_of}, n {n}", "best_of")
    if body.best_of is not None and body.best_of > n and body.stream:
        raise ParameterError("best_of cannot be streamed: which is best is known at the end", "best_of")
    if body.echo and body.logprobs is not None:
        raise ParameterError("echo with logprobs is not supported: prompts are not scored", "echo")
    max_tokens = body.max_tokens if body.max_tokens is not None else _COMPLETIONS_MAX_TOKENS
    params = _params(body, default, max_tokens)
    if body.best_of is not None:
        params = replace(params, n=body.best_of)
    if body.logprobs is not None or body.best_of is not None:
        params = replace(params, logprobs=min(body.logprobs or 0, MAX_LOGPROBS))
    return [Question(prompt, params, body.priority or 0, body.timeout) for prompt in prompts(body.prompt)]


def prompts(prompt: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    """One or many, as text or token ids. Raises ParameterError."""
    if not prompt:
        raise ParameterError("prompt must not be empty", "prompt")
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], int):
        return [prompt]
    return list(prompt)


def messages(turns: list[ChatMessage]) -> list[dict[str, Any]]:
    """As the chat template reads them."""
    dumped = [turn.model_dump(include={"role", "content"}) for turn in turns]
    return [{**turn, "role": "system" if turn["role"] == "developer" else turn["role"]} for turn in dumped]


def _params(body: Sampling, default: SamplingParams, max_tokens: int) -> SamplingParams:
    given = {name: value for name in _SAME_NAME if (value := getattr(body, name)) is not None}
    if body.seed is not None:
        given["seed"] = body.seed % _UINT64
    if body.logit_bias:
        given["logit_bias"] = {_token_id(key): value for key, value in body.logit_bias.items()}
    structured = _structured_outputs(body)
    if structured is not None:
        given["structured_outputs"] = structured
    return replace(default, **given, max_tokens=max_tokens)


def _token_id(key: str) -> int:
    if not (key.isascii() and key.isdigit() and len(key) < 10):
        raise ParameterError(f"logit_bias maps token ids to numbers. Given: {key[:20]!r}", "logit_bias")
    return int(key)


def _structured_outputs(body: Sampling) -> StructuredOutputsParams | None:
    wanted: dict[str, Any] = {
        name: value
        for name, value in (
            ("json", body.guided_json), ("regex", body.guided_regex), ("choice", body.guided_choice),
        )
        if value is not None
    }  # fmt: skip
    if body.structured_outputs is not None:
        given = body.structured_outputs
        wanted |= {
            "json": given.json_,
            "regex": given.regex,
            "choice": given.choice,
            "json_object": given.json_object,
        }
    response_format = getattr(body, "response_format", None)
    if response_format is not None and response_format.type == "json_object":
        wanted["json_object"] = True
    if response_format is not None and response_format.type == "json_schema":
        if response_format.json_schema is None:
            raise ParameterError(
                "response_format of type json_schema needs json_schema", "response_format.json_schema"
            )
        wanted["json"] = response_format.json_schema.schema_
    wanted = {name: value for name, value in wanted.items() if value is not None}
    check_grammar_size(wanted)
    return StructuredOutputsParams(**wanted) if wanted else None
