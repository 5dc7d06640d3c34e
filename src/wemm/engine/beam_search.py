"""Beam search on top of the engine: every step is a batch of one-token requests that share their prefixes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from wemm.processing.processor import ProcessedPrompt
from wemm.processing.tokenizer import Tokenizer
from wemm.request import BeamSearchParams, CompletionOutput, RequestOutput, SamplingParams

Complete = Callable[[Sequence[ProcessedPrompt], SamplingParams], list[RequestOutput]]
"""Answers to prompts, in order."""


@dataclass(frozen=True)
class _Beam:
    token_ids: tuple[int, ...]
    logprob: float
    finish_reason: str | None = None

    def score(self, length_penalty: float) -> float:
        return self.logprob / max(1, len(self.token_ids)) ** length_penalty


def beam_search(
    prompt: ProcessedPrompt, params: BeamSearchParams, max_tokens: int, tokenizer: Tokenizer, complete: Complete
) -> tuple[CompletionOutput, ...]:
    """The best `beam_width` answers, best first; score = log probability / length ** length_penalty.

    `max_tokens` is what the parameters and max_model_len allow together.
    """
    one = SamplingParams(max_tokens=1, logprobs=2 * params.beam_width, ignore_eos=True)
    beams, finished = [_Beam((), 0.0)], list[_Beam]()
    for length in range(1, max_tokens + 1):
        prompts = [ProcessedPrompt((*prompt.token_ids, *beam.token_ids), prompt.image_spans) for beam in beams]
        grown = [
            _Beam((*beam.token_ids, token_id), beam.logprob + entry.logprob)
            for beam, output in zip(beams, complete(prompts, one), strict=True)
            for token_id, entry in (output.outputs[0].logprobs or ({},))[0].items()
        ]
        grown.sort(key=lambda beam: beam.logprob, reverse=True)
        beams = []
        for beam in grown:
            if beam.token_ids[-1] == tokenizer.im_end_id and not params.ignore_eos:
                finished.append(_Beam(beam.token_ids, beam.logprob, "stop"))
            elif length == max_tokens:
                finished.append(_Beam(beam.token_ids, beam.logprob, "length"))
            else:
                beams.append(beam)
            if len(beams) == params.beam_width:
                break
        best = sorted((beam.score(params.length_penalty) for beam in finished), reverse=True)
        if not beams or _cannot_improve(best, beams[0], params, max_tokens):
            break
    finished.sort(key=lambda beam: beam.score(params.length_penalty), reverse=True)
    return tuple(
        CompletionOutput(
            index=index,
            text=tokenizer.decode(beam.token_ids),
            token_ids=beam.token_ids,
            cumulative_logprob=beam.logprob,
            logprobs=None,
            finish_reason=beam.finish_reason,
        )
        for index, beam in enumerate(finished[: params.beam_width])
    )


def _cannot_improve(best: Sequence[float], beam: _Beam, params: BeamSearchParams, max_tokens: int) -> bool:
    """True if the best growing beam, at its longest and without losing more, stays behind all that are wanted."""
    if len(best) < params.beam_width:
        return False
    longest = max_tokens if params.length_penalty > 0 else len(beam.token_ids) + 1
    return beam.logprob / math.pow(longest, params.length_penalty) <= best[params.beam_width - 1]
