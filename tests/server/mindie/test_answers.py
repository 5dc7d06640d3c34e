"""Outputs → bodies and events, without an engine."""

from __future__ import annotations

import asyncio
import json

import pytest

pytest.importorskip("fastapi")

from wemm.checkpoint.checkpoint import BUNDLED_DIRECTORY
from wemm.processing.tokenizer import Tokenizer
from wemm.request import CompletionOutput, Logprob, RequestOutput
from wemm.server.mindie.answers import OwnAnswer, TritonAnswer, VllmAnswer, finish_reason, whole
from wemm.server.mindie.protocol import TgiParameters
from wemm.server.mindie.tgi import TgiAnswer


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(BUNDLED_DIRECTORY / "nano")


def _answer(text, ids, reason=None, stop=None, index=0, score=None):
    logprobs = tuple({i: Logprob(-0.5, 1, "?")} for i in ids)
    return CompletionOutput(index, text, tuple(ids), score, logprobs, reason, stop)


def _output(*answers):
    return RequestOutput("r", (1, 9), answers, finished=all(answer.finish_reason for answer in answers))


def _deltas(*answers):
    return [_output(answer) for answer in answers]


async def _stream(outputs):
    for output in outputs:
        yield output


def _events(render, outputs):
    async def run():
        return [line async for line in render(_stream(outputs))]

    lines = asyncio.run(run())
    assert all(line.startswith("data: ") and line.endswith("\n\n") for line in lines)
    return [json.loads(line[6:]) for line in lines]


def test_the_whole_is_all_deltas():
    outputs = [_output(_answer("a", [3]), _answer("", [], index=1)), _output(_answer("b", [4, 5], "stop"),
               _answer("c", [6], "length", index=1))]  # fmt: skip
    output = asyncio.run(whole(_stream(outputs)))
    assert [(a.text, a.token_ids, len(a.logprobs), a.finish_reason) for a in output.outputs] == [
        ("ab", (3, 4, 5), 3, "stop"),
        ("c", (6,), 1, "length"),
    ]


@pytest.mark.parametrize(
    ("reason", "stop", "expected"),
    [
        ("stop", None, "eos_token"),
        ("stop", "END", "stop_sequence"),
        ("stop", 7, "stop_sequence"),
        ("length", None, "length"),
        ("repetition", None, "stop_sequence"),
    ],
)
def test_finish_reasons(reason, stop, expected):
    assert finish_reason(_answer("", [], reason, stop)) == expected


def _tgi(tokenizer, full_text=False, prompt="P:", **parameters):
    return TgiAnswer(tokenizer, TgiParameters.model_validate(parameters), prompt, 7, full_text)


def test_tgi_streams_one_event_per_token(tokenizer):
    ids = tokenizer.encode("the quick brown fox")
    text = tokenizer.decode(ids)
    end = tokenizer.im_end_id
    events = _events(_tgi(tokenizer, details=True).events, _deltas(_answer(text, ids), _answer("", [end], "stop")))
    assert [event["token"]["id"] for event in events] == [*ids, end]
    assert [event["token"]["text"] for event in events] == [*map(tokenizer.piece_text, ids), ""]
    assert [event["token"]["special"] for event in events] == [False] * len(ids) + [True]
    assert {event["token"]["logprob"] for event in events} == {-0.5}
    assert (
        {event["generated_text"] for event in events[:-1]} == {event["details"] for event in events[:-1]} == {None}
    )
    assert events[-1]["generated_text"] == text
    assert events[-1]["details"] == {
        "prompt_tokens": 2, "finish_reason": "eos_token", "generated_tokens": len(ids) + 1, "seed": 7,
    }  # fmt: skip
    assert "full_text" not in events[-1]


def test_tgi_loses_no_text_where_the_engine_holds_some_back(tokenizer):
    ids = tokenizer.encode("one two three four")
    pieces = [tokenizer.piece_text(i) for i in ids]
    held = _deltas(_answer("", ids[:1]), _answer(pieces[0] + pieces[1], ids[1:2]),
                   _answer("".join(pieces[2:])[:-2], ids[2:], "stop", "ur"))  # fmt: skip
    events = _events(_tgi(tokenizer, return_full_text=True, full_text=True).events, held)
    assert "".join(event["token"]["text"] for event in events) == "".join(pieces)[:-2]
    assert events[-1]["generated_text"] == events[-1]["full_text"] == "P:" + "".join(pieces)[:-2]
    assert events[-1]["details"] is None


def test_tgi_has_a_last_event_where_no_token_came(tokenizer):
    events = _events(_tgi(tokenizer).events, _deltas(_answer("a", [9]), _answer("", [], "stop", "stopInfer")))
    assert events[-1]["token"] == {"id": tokenizer.im_end_id, "text": "", "logprob": None, "special": True}
    assert events[-1]["generated_text"] == "a"


def test_tgi_bodies(tokenizer):
    output = _output(_answer("ab", [300, 301], "length"))
    assert _tgi(tokenizer).body(output).model_dump(exclude_unset=True) == {"generated_text": "ab"}
    body = _tgi(tokenizer, details=True, decoder_input_details=True, return_full_text=True).body(output)
    dumped = body.model_dump(exclude_unset=True)
    assert dumped["generated_text"] == "P:ab"
    assert dumped["details"]["finish_reason"] == "length"
    assert [token["id"] for token in dumped["details"]["prefill"]] == [1, 9]
    assert [token["logprob"] for token in dumped["details"]["tokens"]] == [-0.5, -0.5]


def test_own_events_say_what_they_took():
    deltas = _deltas(_answer("a", [5]), _answer("", []), _answer("bc", [6, 7]), _answer("", [8], "stop"))
    events = _events(OwnAnswer(True, 7, True).events, deltas)
    assert [event["token"] for event in events] == [
        {"id": [5], "text": "a"}, {"id": [6, 7], "text": "bc"}, {"id": [8], "text": None},
    ]  # fmt: skip
    assert [event["prefill_time"] is None for event in events] == [False, True, True]
    assert [event["decode_time"] is None for event in events] == [True, False, False]
    assert events[-1]["generated_text"] == events[-1]["full_text"] == "abc"
    assert events[-1]["details"] == {"finish_reason": "eos_token", "generated_tokens": 4, "seed": 7}
    assert _events(OwnAnswer(False, 7, False).events, deltas)[-1]["details"] is None


def test_triton_events():
    deltas = _deltas(_answer("a", [5]), _answer("b", [6, 7], "length"))
    first, last = _events(TritonAnswer("i", "m", True, True).events, deltas)
    assert first == {
        "id": "i", "model_name": "m", "model_version": None, "text_output": "a",
        "details": {"generated_tokens": 1, "first_token_cost": None, "decode_cost": None},
    }  # fmt: skip
    assert (last["text_output"], last["full_text"]) == ("b", "ab")
    assert last["details"] == {
        "finish_reason": "length", "generated_tokens": 3, "first_token_cost": None, "decode_cost": None,
    }  # fmt: skip
    plain = _events(TritonAnswer("i", "m", False, False).events, deltas)
    assert all(set(event) == {"id", "model_name", "model_version", "text_output"} for event in plain)


def test_vllm_returns_the_most_probable(tokenizer):
    answers = [_answer(text, [5], "stop", index=i, score=score) for i, (text, score) in enumerate(
        [("worst", -3.0), ("best", -1.0), ("middle", -2.0)])]  # fmt: skip
    assert VllmAnswer(tokenizer, "P:", 2, False, False).body(_output(*answers)).text == ["P:best", "P:middle"]
    assert VllmAnswer(tokenizer, "P:", 3, False, False).body(_output(*answers)).text == [
        "P:worst", "P:best", "P:middle",
    ]  # fmt: skip


def test_vllm_streams_objects_with_a_nul_behind_each(tokenizer):
    outputs = [
        _output(_answer("a", [5]), _answer("x", [6], "stop", "END", index=1)),
        _output(_answer("b", [7], "length"), _answer("", [], "stop", "END", index=1)),
    ]

    async def run(include_stop):
        answer = VllmAnswer(tokenizer, "P:", 2, include_stop, True)
        return [line async for line in answer.objects(_stream(outputs))]

    lines = asyncio.run(run(False))
    assert all(line.endswith("}\0") for line in lines)
    assert [json.loads(line[:-1])["text"] for line in lines] == [["a", "x"], ["b", ""]]
    assert json.loads(lines[-1][:-1])["full_text"] == ["ab", "x"]
    with_stop = [json.loads(line[:-1])["text"] for line in asyncio.run(run(True))]
    assert with_stop == [["a", "xEND"], ["b", ""]]


def test_vllm_shows_what_stopped_an_answer(tokenizer):
    [token] = tokenizer.encode("x")[-1:]
    for stop, shown in (("END", "END"), (token, tokenizer.decode([token])), (None, "")):
        body = VllmAnswer(tokenizer, "", 1, True, False).body(_output(_answer("a", [5], "stop", stop)))
        assert body.text == ["a" + shown]
