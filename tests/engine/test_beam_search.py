"""Beam search against its definition: exhaustive where that is possible, greedy where the width is one."""

from __future__ import annotations

import math

import pytest

from wemm import BeamSearchParams, SamplingParams
from wemm.engine.beam_search import beam_search
from wemm.errors import ParameterError
from wemm.processing.processor import ProcessedPrompt
from wemm.request import CompletionOutput, Logprob, RequestOutput

END = 9
# P(next | last): a world of three tokens and the end.
WORLD = {
    None: {1: 0.5, 2: 0.4, 3: 0.1},
    1: {1: 0.35, 2: 0.35, END: 0.3},
    2: {3: 0.9, END: 0.1},
    3: {END: 0.8, 1: 0.2},
}


class _Tokenizer:
    im_end_id = END

    def decode(self, token_ids):
        return "".join(map(str, token_ids))


def _complete(prompts, params):
    outputs = []
    for prompt in prompts:
        last = prompt.token_ids[-1] if len(prompt.token_ids) > 1 else None
        ranked = sorted(WORLD[last].items(), key=lambda item: -item[1])[: params.logprobs]
        entries = {i: Logprob(math.log(p), rank, "") for rank, (i, p) in enumerate(ranked, 1)}
        answer = CompletionOutput(0, "", (ranked[0][0],), 0.0, (entries,), "length")
        outputs.append(RequestOutput("", prompt.token_ids, (answer,), True))
    return outputs


def _search(width, max_tokens=4, **options):
    params = BeamSearchParams(width, **options)
    return beam_search(ProcessedPrompt((0,)), params, max_tokens, _Tokenizer(), _complete)


def _all_answers(max_tokens):
    """Every answer of the world with its log probability."""
    answers, growing = [], [((), 0.0)]
    while growing:
        ids, logprob = growing.pop()
        for token, p in WORLD[ids[-1] if ids else None].items():
            grown = ((*ids, token), logprob + math.log(p))
            (answers if token == END or len(grown[0]) == max_tokens else growing).append(grown)
    return answers


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0, -1.0])
def test_wide_enough_it_finds_the_best_of_all(length_penalty):
    best = sorted(_all_answers(4), key=lambda a: -a[1] / len(a[0]) ** length_penalty)
    found = _search(10, length_penalty=length_penalty)
    assert [answer.cumulative_logprob for answer in found[:3]] == pytest.approx(
        [logprob for _, logprob in best[:3]]
    )
    assert found[0].token_ids == best[0][0]
    assert [answer.index for answer in found] == list(range(len(found)))


def test_it_finds_what_greedy_misses():
    """Greedy begins with 1; the most probable whole answer begins with 2."""
    [narrow] = _search(1, length_penalty=0.0)
    assert narrow.token_ids[0] == 1
    best = _search(2, length_penalty=0.0)[0]
    assert (best.token_ids, best.text, best.finish_reason) == ((2, 3, END), "239", "stop")
    assert best.cumulative_logprob == pytest.approx(math.log(0.4 * 0.9 * 0.8))


def test_at_max_tokens_an_answer_is_cut():
    assert {answer.finish_reason for answer in _search(3, max_tokens=1, ignore_eos=True)} == {"length"}


def test_one_beam_is_greedy(llm, ask, golden_images):
    messages = ask("hi", golden_images / "33x21.png")
    [greedy] = llm.chat(messages, SamplingParams(max_tokens=8, ignore_eos=True, logprobs=0))
    output = llm.beam_search(messages, BeamSearchParams(1, max_tokens=8, ignore_eos=True))
    assert output.outputs[0].token_ids == greedy.outputs[0].token_ids
    assert output.outputs[0].cumulative_logprob == pytest.approx(greedy.outputs[0].cumulative_logprob, abs=1e-3)
    assert output.num_image_tokens == 42


def test_more_beams_find_no_less_probable_an_answer(llm, ask):
    params = [BeamSearchParams(width, max_tokens=5, ignore_eos=True, length_penalty=0.0) for width in (1, 4)]
    narrow, wide = (llm.beam_search(ask("hi"), p).outputs for p in params)
    assert len(wide) == 4
    assert wide[0].cumulative_logprob >= narrow[0].cumulative_logprob - 1e-4
    scores = [answer.cumulative_logprob for answer in wide]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize(
    ("name", "value"), [("beam_width", 0), ("beam_width", 11), ("max_tokens", 0), ("length_penalty", 11)]
)
def test_out_of_range(name, value):
    with pytest.raises(ParameterError, match=name):
        BeamSearchParams(**{"beam_width": 2, name: value})
