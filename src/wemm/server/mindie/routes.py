"""The routes for inference in MindIE's dialects: its own, TGI's, vLLM's and Triton's."""

from __future__ import annotations

import uuid
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel
from starlette.responses import JSONResponse, Response

from wemm.errors import ParameterError
from wemm.processing.processor import IMAGE_TOKEN_ID
from wemm.processing.tokenizer import Tokenizer
from wemm.server.context import context_of
from wemm.server.errors import refusal
from wemm.server.mindie import protocol
from wemm.server.mindie.answers import Outputs, OwnAnswer, TritonAnswer, VllmAnswer, dump, whole
from wemm.server.mindie.asking import Asker, off_loop, read
from wemm.server.mindie.errors import error_body, not_found
from wemm.server.mindie.metadata import add_metadata, check_path, max_output_len
from wemm.server.mindie.nul_stream import NulStream
from wemm.server.mindie.questions import (
    tensor_question,
    text_question,
    tgi_question,
    token_question,
    vllm_question,
)
from wemm.server.mindie.tgi import TgiAnswer
from wemm.server.routing import StrictRoute
from wemm.server.service import Service
from wemm.server.stream import EVENTS, EventStream

_REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": protocol.ErrorBody}
    for status in (400, 401, 403, 404, 408, 413, 421, 422, 424, 429, 500, 503)
}


def router(service: Service) -> APIRouter:
    """All routes of the business plane over one service."""
    routes = APIRouter(route_class=StrictRoute, responses=_REFUSALS)
    asker = Asker(service)
    _add_tgi_and_vllm(routes, _TgiAndVllm(service, asker))
    _add_own(routes, service, asker)
    _add_triton(routes, service, asker)
    add_metadata(routes, service)
    return routes


def _add_tgi_and_vllm(routes: APIRouter, dialect: _TgiAndVllm) -> None:
    @routes.post(
        "/generate",
        response_model=protocol.GeneratedText | protocol.Texts,
        summary="Answer in TGI's words, or in vLLM's to a body with a prompt",
        tags=["TGI", "vLLM"],
    )
    async def generate(body: protocol.GenerateRequest, request: Request) -> Response:
        if isinstance(body, protocol.VllmRequest):
            return await dialect.vllm(body, request)
        answer, outputs = await dialect.tgi(body, request, stream=False)
        return _json(answer.body(await whole(outputs)))

    @routes.post(
        "/generate_stream",
        responses=EVENTS,
        summary="Stream an answer in TGI's words",
        tags=["TGI"],
    )
    async def generate_stream(body: protocol.TgiRequest, request: Request) -> Response:
        answer, outputs = await dialect.tgi(body, request, stream=True)
        return dialect.stream(answer.events(outputs))

    @routes.post(
        "/",
        response_model=list[protocol.GeneratedText],
        responses=EVENTS,
        summary="Either of the two, by `stream`",
        tags=["TGI"],
    )
    async def generate_either(body: protocol.TgiEitherRequest, request: Request) -> Response:
        answer, outputs = await dialect.tgi(body, request, stream=bool(body.stream))
        if body.stream:
            return dialect.stream(answer.events(outputs))
        return JSONResponse([dump(answer.body(await whole(outputs)))])


class _TgiAndVllm:
    """What the routes of TGI and vLLM share: /generate is both."""

    def __init__(self, service: Service, asker: Asker) -> None:
        self._service = service
        self._asker = asker

    async def tgi(self, body: protocol.TgiRequest, request: Request, stream: bool) -> tuple[TgiAnswer, Outputs]:
        parameters = body.parameters or protocol.TgiParameters.model_validate({})
        llm, prompt = self._service.llm, await read(body.inputs, "inputs")
        question = tgi_question(prompt, parameters, llm.default_sampling_params, llm.tokenizer, stream)
        outputs = await self._asker.ask(question, request, "inputs")
        seed, full_text = question.params.seed or 0, self._service.config.full_text
        return TgiAnswer(llm.tokenizer, parameters, prompt.text, seed, full_text), outputs

    async def vllm(self, body: protocol.VllmRequest, request: Request) -> Response:
        service = self._service
        service.check_model(None if body.model == "None" else body.model)
        llm, prompt = service.llm, await read(body.prompt, "prompt")
        question = vllm_question(body, prompt, llm.default_sampling_params, max_output_len(service))
        outputs = await self._asker.ask(question, request, "prompt")
        n = body.n or question.params.n
        include_stop = bool(body.include_stop_str_in_output)
        answer = VllmAnswer(llm.tokenizer, prompt.text, n, include_stop, service.config.full_text)
        if body.stream:
            return NulStream(answer.objects(outputs), service, lambda error: error_body(refusal(error)))
        return _json(answer.body(await whole(outputs)))

    def stream(self, events: AsyncGenerator[str, None]) -> Response:
        return _events(self._service, events)


def _add_own(routes: APIRouter, service: Service, asker: Asker) -> None:
    @routes.post(
        "/infer",
        response_model=protocol.GeneratedText,
        responses=EVENTS,
        summary="Answer in MindIE's own words",
        tags=["MindIE"],
    )
    async def infer(body: protocol.InferRequest, request: Request) -> Response:
        if (body.inputs is None) == (body.input_id is None):
            raise ParameterError("give either inputs or input_id", "inputs")
        return await answered(body, request)

    @routes.post(
        "/infer_token",
        response_model=protocol.GeneratedText,
        responses=EVENTS,
        summary="Continue token ids",
        tags=["MindIE"],
    )
    async def infer_token(body: protocol.InferTokenRequest, request: Request) -> Response:
        return await answered(body, request)

    async def answered(body: protocol.InferRequest, request: Request) -> Response:
        default = service.llm.default_sampling_params
        parameters = body.parameters or protocol.Parameters.model_validate({})
        if body.input_id is not None:
            param, question = "input_id", token_question(body.input_id, parameters, default)
        else:
            assert body.inputs is not None
            param, question = "inputs", text_question(await read(body.inputs, "inputs"), parameters, default)
        outputs = await asker.ask_by_id(question, request, param, body.id or _new_id())
        answer = OwnAnswer(bool(parameters.details), question.params.seed or 0, service.config.full_text)
        if body.stream:
            return _events(service, answer.events(outputs))
        return _json(answer.body(await whole(outputs)))

    @routes.post(
        "/v1/tokenizer",
        response_model=protocol.TokenCount,
        summary="Count the tokens of a prompt, images included",
        tags=["MindIE"],
    )
    async def tokenizer(body: protocol.TokenizerRequest, request: Request) -> Response:
        token_ids: Sequence[int] = ()
        if body.inputs:
            token_ids = await asker.count(await read(body.inputs, "inputs"), request, "inputs")
        tokens: list[str] = []
        if body.do_decode is not False and token_ids:
            tokenizer = service.llm.tokenizer
            tokens = await off_loop(len(token_ids), lambda: _spelled(tokenizer, token_ids))
        return _json(protocol.TokenCount(token_number=len(token_ids), tokens=tokens))


def _add_triton(routes: APIRouter, service: Service, asker: Asker) -> None:
    async def asked(model: str, body: protocol.TritonRequest, request: Request) -> tuple[TritonAnswer, Outputs]:
        check_path(service, model)
        answer_id, default = body.id or _new_id(), service.llm.default_sampling_params
        question = text_question(await read(body.text_input, "text_input"), body.parameters, default)
        outputs = await asker.ask_by_id(question, request, "text_input", answer_id)
        details = bool(body.parameters and body.parameters.details)
        return TritonAnswer(answer_id, service.model_name, details, service.config.full_text), outputs

    @routes.post(
        "/v2/models/{model:path}/generate",
        response_model=protocol.TextOutput,
        summary="Answer in Triton's words",
        tags=["Triton"],
    )
    async def generate(model: str, body: protocol.TritonRequest, request: Request) -> Response:
        answer, outputs = await asked(model, body, request)
        return _json(answer.body(await whole(outputs)))

    @routes.post(
        "/v2/models/{model:path}/generate_stream",
        responses=EVENTS,
        summary="Stream an answer in Triton's words",
        tags=["Triton"],
    )
    async def generate_stream(model: str, body: protocol.TritonRequest, request: Request) -> Response:
        answer, outputs = await asked(model, body, request)
        return _events(service, answer.events(outputs))

    @routes.post(
        "/v2/models/{model:path}/infer",
        response_model=protocol.TensorOutput,
        summary="Continue a tensor of token ids",
        tags=["Triton"],
    )
    async def infer(model: str, body: protocol.TensorRequest, request: Request) -> Response:
        check_path(service, model)
        answer_id = body.id or _new_id()
        question = tensor_question(body, service.llm.default_sampling_params)
        outputs = await asker.ask_by_id(question, request, "inputs", answer_id)
        answer = TritonAnswer(answer_id, service.model_name, details=False, full_text=False)
        return _json(answer.tensor(await whole(outputs), body.outputs[0].name or "output0"))

    @routes.post(
        "/v2/models/{model:path}/stopInfer",
        response_model=protocol.StopRequest,
        summary="End one of the caller's own requests; it answers with what it has",
        tags=["MindIE"],
    )
    async def stop_infer(model: str, body: protocol.StopRequest, request: Request) -> Response:
        check_path(service, model)
        if not asker.running.stop(context_of(request.scope).caller, body.id):
            return not_found(f"no request with the id {body.id!r} is running")
        return JSONResponse({"id": body.id})


def _new_id() -> str:
    return uuid.uuid4().hex


def _json(body: BaseModel) -> Response:
    return Response(body.model_dump_json(exclude_unset=True), media_type="application/json")


def _events(service: Service, events: AsyncGenerator[str, None]) -> Response:
    return EventStream(events, service, lambda error: error_body(refusal(error)))


def _spelled(tokenizer: Tokenizer, token_ids: Sequence[int]) -> list[str]:
    decoder = tokenizer.decoder(skip_special_tokens=False)
    texts = [decoder.push(token_id) for token_id in token_ids if token_id != IMAGE_TOKEN_ID]
    return [text for text in [*texts, decoder.flush()] if text]
