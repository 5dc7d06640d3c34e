"""Bodies of the routes for inference, field for field. null is as good as absent; unknown keys are ignored.

What a field may be for its dialect is checked here, what the engine cannot do in questions.py.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Discriminator, Field, Tag

from wemm.server.openai.protocol import Body, Items, Part

_INT32_MAX = 2**31 - 1
_INT64_MAX = 2**63 - 1
_MAX_STOP_LEN = 1024
_MAX_STOP_TOTAL = 32768
_MAX_NAME_LEN = 256
DEFAULT_PRIORITY = 5


def _not_zero(value: int) -> int:
    if value == 0:
        raise ValueError("must be -1 (all tokens) or above 0")
    return value


def _bounded(stop: str | list[str]) -> str | list[str]:
    total = sum(len(text) for text in ([stop] if isinstance(stop, str) else stop))
    if total > _MAX_STOP_TOTAL:
        raise ValueError(f"all together must have at most {_MAX_STOP_TOTAL} characters; they have {total}")
    return stop


StopString = Annotated[str, Field(min_length=1, max_length=_MAX_STOP_LEN)]
Identifier = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,256}$")]
Parts = Annotated[Items[Part], Field(min_length=1)]


def _text_or_parts(value: Any) -> str:
    return "text" if isinstance(value, str) else "parts"


Content = Annotated[
    Annotated[str, Field(min_length=1), Tag("text")] | Annotated[Parts, Tag("parts")],
    Discriminator(_text_or_parts),
]
"""Raw text, or parts of a question. A text that spells such a list as JSON is the list."""
TopK = Annotated[int, Field(ge=-1, le=_INT32_MAX), AfterValidator(_not_zero)]
MaxTokens = Annotated[int, Field(ge=1, le=_INT32_MAX)]


class Sampling(Body):
    """What all dialects know."""

    temperature: float | None = Field(None, gt=0)
    top_k: TopK | None = None
    top_p: float | None = Field(None, gt=0, lt=1)
    seed: int | None = Field(None, ge=0, le=_INT64_MAX, description="Drawn if it is not given.")
    repetition_penalty: float | None = Field(None, gt=0)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    stop: Annotated[StopString | Items[StopString], AfterValidator(_bounded)] | None = None
    priority: int | None = Field(None, ge=1, le=5, description="1 goes first; 5 if not given.")
    timeout: int | None = Field(None, ge=1, le=65535, description="Seconds for the whole answer.")


class Parameters(Sampling):
    """`parameters` of MindIE's own bodies, and what TGI's and Triton's share with them."""

    max_new_tokens: MaxTokens | None = Field(None, description="20 if not given.")
    do_sample: bool | None = Field(
        None, description="Absent: draw if one of temperature, top_k, top_p is given, else greedy."
    )
    details: bool | None = None
    typical_p: float | None = Field(None, gt=0, le=1, description="Refused unless 1.")
    watermark: bool | None = Field(None, description="Refused unless false.")


class TgiParameters(Parameters):
    """`parameters` of a TGI body."""

    return_full_text: bool | None = Field(None, description="Put the prompt before the answer.")
    decoder_input_details: bool | None = Field(None, description="Return the tokens of a text prompt.")
    truncate: int | None = Field(None, ge=1, le=_INT32_MAX, description="Keep the last tokens of a text prompt.")
    adapter_id: str | None = Field(None, description="Refused: there are no adapters.")
    best_of: int | None = Field(None, ge=1, description="Refused unless 1.")
    top_n_tokens: int | None = Field(None, ge=0, description="Refused unless 0.")
    grammar: dict[str, Any] | None = Field(
        None, description="Refused here; the OpenAI routes know response_format."
    )


class TritonParameters(Parameters):
    """`parameters` of a Triton body."""

    top_k: Annotated[int, Field(ge=0, le=_INT32_MAX)] | None = None
    top_p: float | None = Field(None, gt=0, le=1)
    batch_size: int | None = Field(None, ge=1, le=_INT32_MAX, description="Has no effect.")
    perf_stat: bool | None = Field(None, description="Refused unless false.")


class TgiRequest(Body):
    """POST /generate and /generate_stream."""

    inputs: Content
    parameters: TgiParameters | None = None


class TgiEitherRequest(TgiRequest):
    """POST /."""

    stream: bool | None = None


class VllmRequest(Sampling):
    """POST /generate with `prompt`."""

    prompt: Content
    model: str | None = Field(None, description='The served model; absent, empty and "None" mean the same.')
    max_tokens: MaxTokens | None = None
    temperature: float | None = Field(
        None, ge=0, description="Greedy if 0 or neither it, top_k nor top_p is given."
    )
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1, le=128)
    best_of: int | None = Field(None, ge=1, le=128)
    stop_token_ids: Items[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    stream: bool | None = None
    use_beam_search: bool | None = Field(None, description="Refused unless false.")
    logprobs: bool | int | None = Field(None, description="Refused: the answer has no place for them.")


def _tgi_or_vllm(body: Any) -> str | None:
    prompts = {"tgi": "inputs", "vllm": "prompt"}
    given = [tag for tag, name in prompts.items() if isinstance(body, dict) and body.get(name) is not None]
    return given[0] if len(given) == 1 else None


GenerateRequest = Annotated[
    Annotated[TgiRequest, Tag("tgi")] | Annotated[VllmRequest, Tag("vllm")],
    Discriminator(
        _tgi_or_vllm,
        custom_error_type="tgi_or_vllm",
        custom_error_message="must have either inputs (TGI) or prompt (vLLM)",
    ),
]
"""POST /generate: whose body it is shows in its keys."""


class InferRequest(Body):
    """POST /infer: text, parts or token ids."""

    inputs: Content | None = None
    input_id: Items[int] | None = Field(None, min_length=1)
    id: Identifier | None = Field(None, description="By which stopInfer finds it.")
    stream: bool | None = None
    parameters: Parameters | None = None


class InferTokenRequest(InferRequest):
    """POST /infer_token."""

    inputs: None = None
    input_id: Items[int] = Field(min_length=1)


class TritonRequest(Body):
    """POST /v2/models/{model}/generate and /generate_stream."""

    text_input: Content
    id: Identifier | None = Field(None, description="By which stopInfer finds it.")
    parameters: TritonParameters | None = None


class InputTensor(Body):
    """Token ids, in one row."""

    name: str = Field(max_length=_MAX_NAME_LEN)
    shape: Items[int] = Field(min_length=1, max_length=2, description="[n] or [1, n].")
    datatype: Literal["UINT32"]
    data: Items[int] = Field(min_length=1)
    parameters: TritonParameters | None = None


class OutputName(Body):
    """How the answer's tensor is called."""

    name: str = Field(max_length=_MAX_NAME_LEN)


class TensorRequest(Body):
    """POST /v2/models/{model}/infer. Parameters stand in the input, or beside it."""

    inputs: list[InputTensor] = Field(min_length=1, max_length=1)
    outputs: list[OutputName] = Field(min_length=1, max_length=1)
    id: Identifier | None = Field(None, description="By which stopInfer finds it.")
    parameters: TritonParameters | None = None


class StopRequest(Body):
    """POST /v2/models/{model}/stopInfer."""

    id: Identifier


class TokenizerRequest(Body):
    """POST /v1/tokenizer."""

    inputs: Annotated[Annotated[str, Tag("text")] | Annotated[Parts, Tag("parts")], Discriminator(_text_or_parts)]
    do_decode: bool | None = Field(None, description="Return the tokens as text; true if not given.")


FinishReason = Literal["eos_token", "stop_sequence", "length"]


class Token(BaseModel):
    """One token."""

    id: int
    text: str
    logprob: float | None
    special: bool


class Details(BaseModel):
    """How an answer came about. What one dialect does not know, it leaves out."""

    prompt_tokens: int | None = None
    finish_reason: FinishReason
    generated_tokens: int
    generated_token_ids: list[int] | None = None
    prefill: list[Token] | None = None
    seed: int
    tokens: list[Token] | None = None


class GeneratedText(BaseModel):
    """Answer of TGI and of /infer."""

    generated_text: str
    details: Details | None = None


class Texts(BaseModel):
    """Answer of vLLM: prompt and answer together, n times."""

    text: list[str]


class TritonDetails(BaseModel):
    """How an answer came about."""

    finish_reason: FinishReason | None = None
    generated_tokens: int
    first_token_cost: None = None
    decode_cost: None = None


class TextOutput(BaseModel):
    """Answer of Triton, whole or one event of a stream."""

    id: str
    model_name: str
    model_version: None = None
    text_output: str
    details: TritonDetails | None = None


class OutputTensor(BaseModel):
    """Token ids of an answer, [1, n]."""

    name: str
    shape: list[int]
    datatype: Literal["UINT32"] = "UINT32"
    data: list[int]


class TensorOutput(BaseModel):
    """Answer of Triton's tensor form."""

    id: str
    outputs: list[OutputTensor]


class TokenCount(BaseModel):
    """What a prompt is made of."""

    token_number: int
    tokens: list[str] = Field(description="Tokens that spell one character together are one entry; images none.")


class ErrorBody(BaseModel):
    """Every answer that is no 2xx."""

    error: str
    error_type: str
