"""Outputs → TGI's bodies and events."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from wemm.processing.tokenizer import Tokenizer
from wemm.request import CompletionOutput, RequestOutput
from wemm.server.mindie import protocol
from wemm.server.mindie.answers import Outputs, dump, finish_reason, is_empty
from wemm.server.stream import event


@dataclass(frozen=True)
class TgiAnswer:
    """One answer in TGI's words."""

    tokenizer: Tokenizer
    parameters: protocol.TgiParameters
    prompt: str
    """Stands before the answer if it is asked for."""
    seed: int
    full_text: bool
    """Whether the last event repeats the whole text under MindIE's name."""

    def body(self, output: RequestOutput) -> protocol.GeneratedText:
        """The whole answer."""
        [answer] = output.outputs
        text = self._before + answer.text
        if not (self.parameters.details or self.parameters.decoder_input_details):
            return protocol.GeneratedText(generated_text=text)
        prefill = output.prompt_token_ids if self.parameters.decoder_input_details else ()
        details = protocol.Details(
            prompt_tokens=len(output.prompt_token_ids),
            finish_reason=finish_reason(answer),
            generated_tokens=len(answer.token_ids),
            prefill=[self._token(token_id, None, self.tokenizer.token_text(token_id)) for token_id in prefill],
            seed=self.seed,
            tokens=[
                self._token(token_id, logprob, self.tokenizer.token_text(token_id))
                for token_id, logprob in _tokens(answer)
            ],
        )
        return protocol.GeneratedText(generated_text=text, details=details)

    async def events(self, outputs: Outputs) -> AsyncGenerator[str, None]:
        """One per token; the last has the whole text."""
        share = _Share(self.tokenizer)
        text, num_tokens = self._before, 0
        async with aclosing(outputs):
            async for output in outputs:
                if is_empty(output):
                    continue
                [answer] = output.outputs
                num_tokens += len(answer.token_ids)
                text += answer.text
                # A request that was stopped drew no token, but every event has one: the one that ends answers.
                tokens = _tokens(answer) or [(self.tokenizer.im_end_id, None)]
                pieces = share.out(answer.text, [token_id for token_id, _ in tokens])
                for i, ((token_id, logprob), piece) in enumerate(zip(tokens, pieces, strict=True)):
                    body: dict[str, Any] = {
                        "token": self._token(token_id, logprob, piece).model_dump(),
                        "generated_text": None,
                        "details": None,
                    }
                    if output.finished and i == len(tokens) - 1:
                        body |= {"generated_text": text, "details": self._details(output, num_tokens)}
                        if self.full_text:
                            body["full_text"] = text
                    yield event(body)

    @property
    def _before(self) -> str:
        return self.prompt if self.parameters.return_full_text else ""

    def _details(self, output: RequestOutput, num_tokens: int) -> dict[str, Any] | None:
        if not self.parameters.details:
            return None
        details = protocol.Details(
            prompt_tokens=len(output.prompt_token_ids),
            finish_reason=finish_reason(output.outputs[0]),
            generated_tokens=num_tokens,
            seed=self.seed,
        )
        return dump(details)

    def _token(self, token_id: int, logprob: float | None, text: str) -> protocol.Token:
        special = token_id in self.tokenizer.special_ids
        return protocol.Token(id=token_id, text=text, logprob=logprob, special=special)


def _tokens(answer: CompletionOutput) -> list[tuple[int, float | None]]:
    if answer.logprobs is None:
        return [(token_id, None) for token_id in answer.token_ids]
    return [
        (token_id, entry[token_id].logprob)
        for token_id, entry in zip(answer.token_ids, answer.logprobs, strict=True)
    ]


class _Share:
    """The text of a delta, shared out among its tokens.

    The engine holds back what may become a stop string, so that text may come later than its token, or never.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decoder = tokenizer.decoder()

    def out(self, text: str, token_ids: list[int]) -> list[str]:
        lengths = [len(self._decoder.push(token_id)) for token_id in token_ids]
        pieces, position = [], 0
        for length in lengths[:-1]:
            pieces.append(text[position : position + length])
            position += length
        return [*pieces, text[position:]]
