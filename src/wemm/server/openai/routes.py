"""The OpenAI routes: a body becomes questions, outputs become a body or events."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from wemm.errors import ParameterError
from wemm.request import CompletionOutput, Logprob, RequestOutput
from wemm.server.context import RequestContext, context_of
from wemm.server.errors import Refusal, UnknownModelError, refusal
from wemm.server.openai import protocol
from wemm.server.openai.questions import chat_question, completion_questions, messages, prompts
from wemm.server.routing import StrictRoute
from wemm.server.service import Generation, Question, Service, complete_all, merged
from wemm.server.stream import DONE, EVENTS, EventStream, event

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_CLIENT_ERROR, _SERVER_ERROR = "invalid_request_error", "server_error"
_FIRST_SERVER_ERROR = 500
_REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": protocol.ErrorBody} for status in (400, 401, 403, 404, 408, 413, 421, 429, 500, 503, 504)
}


def error_body(problem: Refusal) -> dict[str, Any]:
    """OpenAI's shape of an error."""
    kind = _SERVER_ERROR if problem.status >= _FIRST_SERVER_ERROR else _CLIENT_ERROR
    return {
        "error": {
            "message": problem.message,
            "type": _TYPES.get(problem.status, kind),
            "param": problem.param,
            "code": problem.kind,
        }
    }


def error_response(problem: Refusal) -> Response:
    """The same as a response."""
    return JSONResponse(error_body(problem), problem.status, problem.headers)


def router(service: Service) -> APIRouter:
    """All routes over one service."""
    routes = APIRouter(route_class=StrictRoute, responses=_REFUSALS)

    @routes.post(
        "/v1/chat/completions",
        response_model=protocol.ChatCompletion,
        responses=EVENTS,
        summary="Answer a conversation about images",
        tags=["OpenAI"],
    )
    async def chat_completions(body: protocol.ChatCompletionRequest, request: Request) -> Response:
        service.check_model(body.model)
        llm, context = service.llm, context_of(request.scope)
        room = service.config.default_max_tokens or llm.max_model_len
        question = chat_question(body, llm.default_sampling_params, room)
        generation = await service.begin(question, context)
        answer = _Answer(
            service, context, f"chatcmpl-{context.request_id}", body.stream_options, question.params.logprobs
        )
        if body.stream:
            return _stream(service, answer.chat_events(generation))
        return _json(answer.chat(await generation.complete()))

    @routes.post(
        "/v1/completions",
        response_model=protocol.Completion,
        responses=EVENTS,
        summary="Continue raw text",
        tags=["OpenAI"],
    )
    async def completions(body: protocol.CompletionRequest, request: Request) -> Response:
        service.check_model(body.model)
        context = context_of(request.scope)
        num_prompts = len(prompts(body.prompt))
        if num_prompts > service.config.max_queued_requests:
            raise ParameterError(f"{num_prompts} prompts; at most {service.config.max_queued_requests}", "prompt")
        questions = completion_questions(body, service.llm.default_sampling_params)
        generations = [await service.begin(question, context) for question in questions]
        answer = _Answer(service, context, f"cmpl-{context.request_id}", body.stream_options, body.logprobs)
        echoed = [await _echoed(service, prompt) if body.echo else "" for prompt in prompts(body.prompt)]
        if body.stream:
            return _stream(service, answer.completion_events(generations, echoed))
        outputs = await complete_all(generations)
        return _json(answer.completion(outputs, echoed, body.n or 1))

    @routes.get("/v1/models", response_model=protocol.ModelList, summary="What is served", tags=["OpenAI"])
    async def models() -> protocol.ModelList:
        return protocol.ModelList(data=[_model(service)])

    @routes.get("/v1/models/{model:path}", response_model=protocol.Model, summary="One of them", tags=["OpenAI"])
    async def model(model: str) -> protocol.Model:
        if model != service.model_name:
            raise UnknownModelError(f"model {model[:100]!r} is not served here; it is {service.model_name!r}")
        return _model(service)

    @routes.post(
        "/tokenize",
        response_model=protocol.Tokens,
        summary="Token ids of a prompt or a conversation, images counted",
        tags=["Tokens"],
    )
    async def tokenize(body: protocol.TokenizeRequest, request: Request) -> protocol.Tokens:
        service.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ParameterError("give either prompt or messages", "prompt")
        prompt: Any = body.prompt if body.messages is None else messages(body.messages)
        llm = service.llm
        question = Question(prompt, llm.default_sampling_params)
        processed = await service.count(question, context_of(request.scope))
        return protocol.Tokens(
            count=len(processed.token_ids),
            max_model_len=llm.max_model_len,
            tokens=list(processed.token_ids),
            image_tokens=processed.num_image_tokens,
        )

    @routes.post("/detokenize", response_model=protocol.Text, summary="Text of token ids", tags=["Tokens"])
    async def detokenize(body: protocol.DetokenizeRequest) -> protocol.Text:
        service.check_model(body.model)
        llm = service.llm
        llm.processor.token_ids(body.tokens)  # refuses what is no id
        return protocol.Text(prompt=llm.tokenizer.decode(body.tokens, skip_special_tokens=False))

    return routes


async def _echoed(service: Service, prompt: str | list[int]) -> str:
    return prompt if isinstance(prompt, str) else service.llm.tokenizer.decode(prompt)


def _json(body: Any) -> Response:
    return Response(body.model_dump_json(), media_type="application/json")


def _stream(service: Service, events: AsyncGenerator[str, None]) -> Response:
    return EventStream(events, service, lambda error: error_body(refusal(error)), DONE)


def _model(service: Service) -> protocol.Model:
    length = service.llm.max_model_len if service.supervisor.is_ready else None
    return protocol.Model(id=service.model_name, created=service.started, max_model_len=length)


class _Answer:
    """Outputs of one request in OpenAI's words."""

    def __init__(
        self,
        service: Service,
        context: RequestContext,
        answer_id: str,
        stream_options: protocol.StreamOptions | None,
        num_top: int | None,
    ) -> None:
        """`num_top`: how many candidates per token were asked for; None for no log probabilities."""
        self._head: Mapping[str, Any] = {
            "id": answer_id, "created": int(time.time()), "model": service.model_name,
        }  # fmt: skip
        self._include_usage = bool(stream_options and stream_options.include_usage)
        self._num_top = -1 if num_top is None else num_top
        self._tokenizer = service.llm.tokenizer

    def chat(self, output: RequestOutput) -> protocol.ChatCompletion:
        """The whole answer."""
        choices = [
            protocol.ChatChoice(
                index=answer.index,
                message=protocol.AnswerMessage(content=answer.text),
                logprobs=self._chat_logprobs(answer),
                **_finish(answer),
            )
            for answer in output.outputs
        ]
        return protocol.ChatCompletion(**self._head, choices=choices, usage=_usage([output], _num_tokens(output)))

    async def chat_events(self, generation: Generation) -> AsyncGenerator[str, None]:
        """The role first, then deltas, then the usage if it is wanted."""
        num_tokens = 0
        for index in range(generation.params.n):
            yield self._chat_event(index, protocol.Delta(role="assistant", content=""))
        ended: set[int] = set()
        async with aclosing(generation.deltas()) as deltas:
            async for output in deltas:
                num_tokens += _num_tokens(output)
                for answer in output.outputs:
                    if answer.index in ended or not (answer.token_ids or answer.finish_reason):
                        continue
                    delta = protocol.Delta(content=answer.text)
                    yield self._chat_event(answer.index, delta, self._chat_logprobs(answer), **_finish(answer))
                    if answer.finish_reason:
                        ended.add(answer.index)
        if self._include_usage:
            usage = _usage([output], num_tokens)
            yield event(_dump(protocol.ChatCompletionChunk(**self._head, choices=[], usage=usage)))

    def _chat_event(
        self, index: int, delta: protocol.Delta, logprobs: protocol.ChoiceLogprobs | None = None, **finish: Any
    ) -> str:
        choice = protocol.ChunkChoice(index=index, delta=delta, logprobs=logprobs, **finish)
        return event(_dump(protocol.ChatCompletionChunk(**self._head, choices=[choice])))

    def completion(self, outputs: list[RequestOutput], echoed: list[str], n: int) -> protocol.Completion:
        """The whole answers, prompt after prompt; with best_of the n most probable of each."""
        choices = []
        for i, output in enumerate(outputs):
            answers = list(output.outputs)
            if len(answers) > n:
                answers.sort(key=lambda answer: -(answer.cumulative_logprob or 0.0))
            for j, answer in enumerate(answers[:n]):
                choices.append(
                    protocol.CompletionChoice(
                        index=i * n + j,
                        text=echoed[i] + answer.text,
                        logprobs=self._completion_logprobs(answer),
                        **_finish(answer),
                    )
                )
        num_tokens = sum(_num_tokens(output) for output in outputs)
        return protocol.Completion(**self._head, choices=choices, usage=_usage(outputs, num_tokens))

    async def completion_events(
        self, generations: list[Generation], echoed: list[str]
    ) -> AsyncGenerator[str, None]:
        """Deltas of all prompts as they come."""
        num_tokens = 0
        last: dict[int, RequestOutput] = {}
        begun: set[int] = set()
        ended: set[int] = set()
        async with aclosing(merged(generations)) as deltas:
            async for i, output in deltas:
                last[i] = output
                num_tokens += _num_tokens(output)
                for answer in output.outputs:
                    index = i * len(output.outputs) + answer.index
                    if index in ended or not (answer.token_ids or answer.finish_reason):
                        continue
                    text = answer.text if index in begun else echoed[i] + answer.text
                    begun.add(index)
                    if answer.finish_reason:
                        ended.add(index)
                    choice = protocol.CompletionChoice(
                        index=index, text=text, logprobs=self._completion_logprobs(answer), **_finish(answer)
                    )
                    yield event(_dump(protocol.Completion(**self._head, choices=[choice])))
        if self._include_usage:
            usage = _usage(list(last.values()), num_tokens)
            yield event(_dump(protocol.Completion(**self._head, choices=[], usage=usage)))

    def _chat_logprobs(self, answer: CompletionOutput) -> protocol.ChoiceLogprobs | None:
        if answer.logprobs is None or self._num_top < 0:
            return None
        content = []
        for token_id, candidates in zip(answer.token_ids, answer.logprobs, strict=True):
            chosen = self._token(token_id, candidates[token_id])
            # The chosen token is listed among its rivals only if it is one of the most probable.
            top = [self._token(i, entry) for i, entry in candidates.items() if entry.rank <= self._num_top]
            content.append(protocol.TokenLogprob(**chosen.model_dump(), top_logprobs=top))
        return protocol.ChoiceLogprobs(content=content)

    def _token(self, token_id: int, entry: Logprob) -> protocol.TopLogprob:
        spelled = list(self._tokenizer.token_bytes(token_id))
        return protocol.TopLogprob(token=entry.decoded_token, logprob=entry.logprob, bytes=spelled)

    def _completion_logprobs(self, answer: CompletionOutput) -> protocol.CompletionLogprobs | None:
        if answer.logprobs is None or self._num_top < 0:
            return None
        chosen = [entry[i] for i, entry in zip(answer.token_ids, answer.logprobs, strict=True)]
        offsets, position = [], 0
        for entry in chosen:
            offsets.append(position)
            position += len(entry.decoded_token)
        return protocol.CompletionLogprobs(
            tokens=[entry.decoded_token for entry in chosen],
            token_logprobs=[entry.logprob for entry in chosen],
            top_logprobs=[{e.decoded_token: e.logprob for e in entry.values()} for entry in answer.logprobs],
            text_offset=offsets,
        )


def _dump(body: Any) -> dict[str, Any]:
    dumped: dict[str, Any] = body.model_dump()
    if dumped.get("usage") is None:
        dumped.pop("usage", None)
    for choice in dumped["choices"]:
        if "delta" in choice:
            choice["delta"] = {name: value for name, value in choice["delta"].items() if value is not None}
    return dumped


def _finish(answer: CompletionOutput) -> dict[str, Any]:
    # OpenAI knows no "repetition"; its clients need one of their own reasons.
    if answer.finish_reason == "repetition":
        return {"finish_reason": "stop", "stop_reason": "repetition"}
    return {"finish_reason": answer.finish_reason, "stop_reason": answer.stop_reason}


def _num_tokens(output: RequestOutput) -> int:
    return sum(len(answer.token_ids) for answer in output.outputs)


def _usage(outputs: list[RequestOutput], num_tokens: int) -> protocol.Usage:
    num_prompt_tokens = sum(len(output.prompt_token_ids) for output in outputs)
    return protocol.Usage(
        prompt_tokens=num_prompt_tokens,
        completion_tokens=num_tokens,
        total_tokens=num_prompt_tokens + num_tokens,
        prompt_tokens_details=protocol.PromptTokensDetails(
            cached_tokens=sum(output.num_cached_tokens for output in outputs),
            image_tokens=sum(output.num_image_tokens for output in outputs),
        ),
    )
