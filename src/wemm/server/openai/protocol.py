"""Bodies of the OpenAI routes, field for field; what we add is marked. Unknown keys are ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from wemm.request import MAX_LOGIT_BIAS

_INT32_MAX = 2**31 - 1
_INT64_MAX = 2**63 - 1

Item = TypeVar("Item")
Items = Annotated[list[Item], Field(fail_fast=True)]
"""A list that is checked up to its first mistake: to describe every one of a million would hold everybody up."""


def _few(bias: Any) -> Any:
    if isinstance(bias, dict) and len(bias) > MAX_LOGIT_BIAS:
        raise ValueError(f"takes at most {MAX_LOGIT_BIAS} tokens; it has {len(bias)}")
    return bias


class Body(BaseModel):
    """A request body: types as JSON has them ("1" is no number), other keys let through."""

    model_config = ConfigDict(strict=True, extra="allow")


class TextPart(Body):
    """Text of a message."""

    type: Literal["text"]
    text: str


class ImageUrl(Body):
    """Where an image is: `data:image/…;base64,…`, or what the operator allowed of http(s): and file:."""

    url: str = Field(min_length=1)
    detail: Literal["auto", "low", "high"] | None = Field(
        None,
        description="low: the model sees half its own edges and a quarter of the image tokens. auto, high: its "
        "own rule, a long edge of 1960 pixels for WeMM-Chat-2k-CN.",
    )


class ImagePart(Body):
    """An image of a message."""

    type: Literal["image_url"]
    image_url: ImageUrl | str


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]


class ChatMessage(Body):
    """One turn. Only the user's may hold images; `developer` is `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[Items[Part], Field(min_length=1)]


class StreamOptions(Body):
    """What a stream carries besides text."""

    include_usage: bool | None = None


class JsonSchema(Body):
    """A named schema."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """What the answer must be."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None


class StructuredOutputs(Body):
    """vLLM's spelling: exactly one of these."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: Items[str] | None = None
    json_object: bool | None = None


class Sampling(Body):
    """Fields that chat and completions share."""

    model: str | None = Field(None, description="The served model; absent means the same.")
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | Items[str] | None = None
    seed: int | None = Field(None, ge=-_INT64_MAX - 1, le=_INT64_MAX)
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[str, float] | None, BeforeValidator(_few)] = Field(
        None, description="Token id → what is added to its logit."
    )
    user: str | None = None
    # Ours and vLLM's:
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: Items[int] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    repetition_guard: bool | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Items[str] | None = None
    structured_outputs: StructuredOutputs | None = None
    priority: int | None = Field(None, description="Smaller goes first.")
    timeout: float | None = Field(None, gt=0, description="Seconds for the whole answer.")


class ChatCompletionRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: Items[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(
        None, ge=1, le=_INT32_MAX, description="The newer name of max_tokens; wins over it."
    )
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: Items[dict[str, Any]] | None = Field(
        None, description="Refused unless empty: the model knows no tools."
    )


class CompletionRequest(Sampling):
    """POST /v1/completions: raw text or token ids, no template, no images."""

    prompt: str | Items[str] | Items[int] | Items[Items[int]]
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = Field(None, description="Refused: the model cannot fill in.")


class PromptTokensDetails(BaseModel):
    """Of prompt_tokens."""

    cached_tokens: int
    image_tokens: int


class Usage(BaseModel):
    """Tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(BaseModel):
    """A candidate token."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """The chosen token and its rivals."""

    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(BaseModel):
    """One entry per token of the answer."""

    content: list[TokenLogprob] | None
    refusal: None = None


class AnswerMessage(BaseModel):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


FinishReason = Literal["stop", "length"]


class ChatChoice(BaseModel):
    """One of n answers."""

    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: FinishReason
    stop_reason: int | str | None = Field(
        None, description='Ours: the stop string or token that ended it; "repetition" if it went round in circles.'
    )


class ChatCompletion(BaseModel):
    """Answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(BaseModel):
    """What is new."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    """Of one answer."""

    index: int
    delta: Delta
    logprobs: ChoiceLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


class ChatCompletionChunk(BaseModel):
    """One event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class CompletionLogprobs(BaseModel):
    """The older format: parallel lists."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One of n answers to one of the prompts."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None = None


class Completion(BaseModel):
    """Answer of /v1/completions, whole or one event of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class Model(BaseModel):
    """What is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "wemm"
    max_model_len: int | None


class ModelList(BaseModel):
    """All of them: one."""

    object: Literal["list"] = "list"
    data: list[Model]


class TokenizeRequest(Body):
    """POST /tokenize (vLLM's): a prompt or messages; images are counted, nothing is computed."""

    model: str | None = None
    prompt: str | None = None
    messages: Items[ChatMessage] | None = None


class Tokens(BaseModel):
    """Token ids; image positions hold -200."""

    count: int
    max_model_len: int
    tokens: list[int]
    image_tokens: int


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: Items[int]


class Text(BaseModel):
    """What tokens spell."""

    prompt: str


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every answer that is no 2xx."""

    error: ErrorDetail
