"""Answers of a model with random weights that follow a schema, an expression or a list of choices all the same."""

from __future__ import annotations

import json
import re

import pytest

from wemm import LLM, SamplingParams, StructuredOutputsParams
from wemm.errors import ParameterError

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "count": {"type": "integer", "maximum": 99, "minimum": 0},
    },
    "required": ["name", "count"],
    "additionalProperties": False,
}


def _params(temperature=1.0, max_tokens=200, seed=0, **structure):
    return SamplingParams(
        temperature=temperature,
        max_tokens=max_tokens,
        seed=seed,
        structured_outputs=StructuredOutputsParams(**structure),
    )


def _texts(llm, ask, params, count=4):
    outputs = llm.chat([ask(f"{i}?") for i in range(count)], params)
    assert {output.outputs[0].finish_reason for output in outputs} == {"stop"}
    return [output.outputs[0].text for output in outputs]


@pytest.mark.parametrize("temperature", [0.0, 1.0, 5.0])
def test_a_schema_is_followed(llm, ask, temperature):
    for text in _texts(llm, ask, _params(temperature, json=SCHEMA)):
        value = json.loads(text)
        assert set(value) == {"name", "count"}
        assert 0 <= value["count"] <= 99
        assert len(value["name"]) <= 6


def test_a_tokenizer_that_begins_texts_with_a_space_does_not_put_one_into_answers():
    """Nano's does. The real answers of a model that was never taught JSON."""
    with LLM("nano", dtype="float32", device="cpu", max_model_len=512) as nano:
        message = [{"role": "user", "content": "?"}]
        [output] = nano.chat(message, _params(temperature=0.0, json=SCHEMA))
        assert set(json.loads(output.outputs[0].text)) == {"name", "count"}
        [output] = nano.chat(message, _params(temperature=0.0, choice=["{a}", "{好}"]))
        assert output.outputs[0].text in ("{a}", "{好}")


def test_an_expression_is_matched(llm, ask):
    for text in _texts(llm, ask, _params(regex=r"[A-Z]{3}-\d{2,4}")):
        assert re.fullmatch(r"[A-Z]{3}-\d{2,4}", text)


def test_a_choice_is_made_in_any_script(llm, ask):
    choices = ["yes", "no", "不知道", 'a "quoted" one', "no way"]
    for text in _texts(llm, ask, _params(temperature=3.0, choice=choices), count=8):
        assert text in choices


def test_structured_and_free_answers_in_one_batch(llm, ask):
    free = SamplingParams(max_tokens=8, ignore_eos=True)
    alone = llm.chat(ask("free"), free)[0].outputs[0].token_ids
    bound, other = llm.chat([ask("bound"), ask("free")], [_params(choice=["yes", "no"]), free])
    assert bound.outputs[0].text in ("yes", "no")
    assert other.outputs[0].token_ids == alone


def test_several_answers_walk_the_grammar_each_for_itself(llm, ask):
    params = SamplingParams(
        n=4,
        temperature=5.0,
        seed=1,
        max_tokens=40,
        structured_outputs=StructuredOutputsParams(regex="[ab]{5}[cd]{5}"),
    )
    texts = [answer.text for answer in llm.chat(ask("hi"), params)[0].outputs]
    assert all(re.fullmatch("[ab]{5}[cd]{5}", text) for text in texts)
    assert len(set(texts)) > 1


def test_with_guesses_and_caches_on(ask):
    with LLM("tiny", dtype="float32", device="cpu", max_model_len=400) as llm:
        for text in _texts(llm, ask, _params(0.0, regex="(ab){20}")):
            assert text == "ab" * 20
        assert llm.stats.num_draft_tokens == 0


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        ({}, "takes exactly one of json, regex, choice, json_object. Given: none"),
        ({"regex": "a", "choice": ["b"]}, r"Given: \['regex', 'choice'\]"),
        ({"json": 3}, "structured_outputs.json must be a JSON schema. Given: 3"),
        ({"regex": 3}, "structured_outputs.regex must be text"),
        ({"choice": [3]}, "structured_outputs.choice must be a list of str"),
        ({"choice": ["a", ""]}, "structured_outputs.choice must not be empty text"),
    ],
)
def test_wrong_structures_are_refused_at_once(structure, message):
    with pytest.raises(ParameterError, match=message):
        StructuredOutputsParams(**structure)


@pytest.mark.parametrize(
    "structure",
    [
        {"regex": "a("},
        {"regex": r"(a)\1"},
        {"json": {"type": "nonsense"}},
        {"json": "{not json"},
        {"json": {"$ref": "x"}},
    ],
)
def test_what_cannot_be_followed_is_named_and_the_next_request_works(llm, ask, structure):
    with pytest.raises(ParameterError, match=r"structured_outputs\.(regex|json): ") as error:
        llm.chat([ask("hi"), ask("hi")], [SamplingParams(max_tokens=2), _params(**structure)])
    assert "\n" not in str(error.value)
    assert llm.chat(ask("hi"), SamplingParams(max_tokens=2))[0].finished


@pytest.mark.parametrize("options", [{"ignore_eos": True}, {"min_tokens": 3}])
def test_an_end_that_two_would_decide(options):
    with pytest.raises(ParameterError, match="cannot be kept where structured_outputs says"):
        SamplingParams(structured_outputs=StructuredOutputsParams(choice=["a"]), **options)


def test_without_the_library_it_says_what_to_install(llm, ask, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    with pytest.raises(ParameterError, match=r"pip install 'wemm\[structured\]'"):
        llm.chat(ask("hi"), _params(choice=["a"]))
