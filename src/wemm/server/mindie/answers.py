"""Outputs → bodies and events of MindIE's own dialect, Triton's and vLLM's; TGI's are in tgi.py."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from wemm.engine.async_llm import joined
from wemm.processing.tokenizer import Tokenizer
from wemm.request import CompletionOutput, RequestOutput
from wemm.server.mindie import protocol
from wemm.server.mindie.nul_stream import nul_object
from wemm.server.stream import event

Outputs = AsyncGenerator[RequestOutput, None]


async def whole(outputs: Outputs) -> RequestOutput:
    """All deltas as one."""
    return joined([output async for output in outputs])


def finish_reason(answer: CompletionOutput) -> protocol.FinishReason:
    """TGI's names. It has none for an answer that went round in circles, or that its caller stopped."""
    if answer.finish_reason == "length":
        return "length"
    is_natural = answer.finish_reason == "stop" and answer.stop_reason is None
    return "eos_token" if is_natural else "stop_sequence"


def dump(body: BaseModel) -> dict[str, Any]:
    """Without what was not set: a field is null only where the dialect says null."""
    return body.model_dump(exclude_unset=True)


def is_empty(output: RequestOutput) -> bool:
    """Whether nobody needs to hear of it."""
    return not output.finished and not any(answer.token_ids for answer in output.outputs)


@dataclass(frozen=True)
class OwnAnswer:
    """MindIE's own words, of /infer and /infer_token."""

    details: bool
    seed: int
    full_text: bool
    """Whether the last event repeats the whole text under a name of its own."""

    def body(self, output: RequestOutput) -> protocol.GeneratedText:
        """The whole answer."""
        [answer] = output.outputs
        if not self.details:
            return protocol.GeneratedText(generated_text=answer.text)
        details = protocol.Details(
            finish_reason=finish_reason(answer),
            generated_tokens=len(answer.token_ids),
            generated_token_ids=list(answer.token_ids),
            seed=self.seed,
        )
        return protocol.GeneratedText(generated_text=answer.text, details=details)

    async def events(self, outputs: Outputs) -> AsyncGenerator[str, None]:
        """One per delta, with the milliseconds it took; the last has the whole text."""
        text, num_tokens, before = "", 0, None
        async with aclosing(outputs):
            async for output in outputs:
                if is_empty(output):
                    continue
                [answer] = output.outputs
                text += answer.text
                num_tokens += len(answer.token_ids)
                now = time.perf_counter()
                body: dict[str, Any] = {
                    "prefill_time": _milliseconds(output.metrics.first_token) if before is None else None,
                    "decode_time": None if before is None else _milliseconds(now - before),
                }
                before = now
                token: dict[str, Any] = {"id": list(answer.token_ids), "text": answer.text}
                if output.finished:
                    body |= {"generated_text": text, "details": self._details(answer, num_tokens)}
                    token["text"] = answer.text or None
                    if self.full_text:
                        body["full_text"] = text
                yield event({**body, "token": token})

    def _details(self, answer: CompletionOutput, num_tokens: int) -> dict[str, Any] | None:
        if not self.details:
            return None
        reason = finish_reason(answer)
        return dump(protocol.Details(finish_reason=reason, generated_tokens=num_tokens, seed=self.seed))


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 2)


@dataclass(frozen=True)
class TritonAnswer:
    """Triton's words, for text and for tensors."""

    answer_id: str
    model_name: str
    details: bool
    full_text: bool
    """Whether the last event repeats the whole text."""

    def body(self, output: RequestOutput) -> protocol.TextOutput:
        """The whole answer."""
        [answer] = output.outputs
        return self._output(answer, len(answer.token_ids))

    async def events(self, outputs: Outputs) -> AsyncGenerator[str, None]:
        """One per delta."""
        text, num_tokens = "", 0
        async with aclosing(outputs):
            async for output in outputs:
                if is_empty(output):
                    continue
                [answer] = output.outputs
                text += answer.text
                num_tokens += len(answer.token_ids)
                body = dump(self._output(answer, num_tokens))
                if output.finished and self.full_text:
                    body["full_text"] = text
                yield event(body)

    def tensor(self, output: RequestOutput, name: str) -> protocol.TensorOutput:
        """The whole answer as token ids."""
        token_ids = list(output.outputs[0].token_ids)
        tensor = protocol.OutputTensor(name=name, shape=[1, len(token_ids)], datatype="UINT32", data=token_ids)
        return protocol.TensorOutput(id=self.answer_id, outputs=[tensor])

    def _output(self, answer: CompletionOutput, num_tokens: int) -> protocol.TextOutput:
        more: dict[str, Any] = {}
        if self.details:
            known: dict[str, Any] = {"finish_reason": finish_reason(answer)} if answer.finish_reason else {}
            more["details"] = protocol.TritonDetails(
                **known, generated_tokens=num_tokens, first_token_cost=None, decode_cost=None
            )
        return protocol.TextOutput(
            id=self.answer_id, model_name=self.model_name, model_version=None, text_output=answer.text, **more
        )


@dataclass(frozen=True)
class VllmAnswer:
    """vLLM's words."""

    tokenizer: Tokenizer
    prompt: str
    """Stands before every answer."""
    n: int
    include_stop: bool
    """Whether the text shows what stopped it."""
    full_text: bool
    """Whether the last object of a stream repeats the whole texts."""

    def body(self, output: RequestOutput) -> protocol.Texts:
        """The whole answers, the most probable first if more were drawn than are wanted."""
        answers = list(output.outputs)
        if len(answers) > self.n:
            answers.sort(key=lambda answer: -(answer.cumulative_logprob or 0.0))
        return protocol.Texts(text=[self.prompt + self._text(answer) for answer in answers[: self.n]])

    async def objects(self, outputs: Outputs) -> AsyncGenerator[str, None]:
        """What is new of every answer; no events, but JSON objects with a NUL behind each."""
        texts = [""] * self.n
        ended = [False] * self.n
        async with aclosing(outputs):
            async for output in outputs:
                if is_empty(output):
                    continue
                deltas = ["" if ended[answer.index] else self._text(answer) for answer in output.outputs]
                ended = [
                    had or answer.finish_reason is not None
                    for had, answer in zip(ended, output.outputs, strict=True)
                ]
                texts = [text + delta for text, delta in zip(texts, deltas, strict=True)]
                more = {"full_text": texts} if output.finished and self.full_text else {}
                yield nul_object({"text": deltas, **more})

    def _text(self, answer: CompletionOutput) -> str:
        stop = answer.stop_reason
        if not self.include_stop or stop is None:
            return answer.text
        return answer.text + (stop if isinstance(stop, str) else self.tokenizer.decode([stop]))
