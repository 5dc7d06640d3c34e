"""The real `openai` client against a running service: each understands the other."""

from __future__ import annotations

import re
import time

import openai
import pydantic
import pytest

from tests.server.conftest import QUESTIONS, conversation, image_part
from wemm.checkpoint.checkpoint import BUNDLED_DIRECTORY
from wemm.processing.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def api(served):
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="any", max_retries=0, timeout=60) as api:
        yield api


def _ask(api, name="word.png", **options):
    return api.chat.completions.create(model="nano", messages=conversation(name), **options)


@pytest.mark.parametrize("name", QUESTIONS)
def test_it_reads_images(api, name):
    completion = _ask(api, name, max_completion_tokens=32)
    [choice] = completion.choices
    assert choice.message.content == QUESTIONS[name][1]
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "stop"
    usage = completion.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.image_tokens >= 6
    assert usage.completion_tokens >= 2


def test_a_stream_says_what_the_whole_says(api):
    options = dict(max_tokens=24, n=2, temperature=1.0, seed=5, logprobs=True, top_logprobs=2)
    whole = _ask(api, "shapes.png", **options)
    chunks = list(_ask(api, "shapes.png", **options, stream=True, stream_options={"include_usage": True}))
    assert [c.delta.role for chunk in chunks[:2] for c in chunk.choices] == ["assistant"] * 2
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    for index in range(2):
        parts = [c for chunk in chunks for c in chunk.choices if c.index == index]
        assert "".join(part.delta.content or "" for part in parts) == whole.choices[index].message.content
        assert [p.finish_reason for p in parts if p.finish_reason] == [whole.choices[index].finish_reason]
        tokens = [token for part in parts if part.logprobs for token in part.logprobs.content]
        expected = whole.choices[index].logprobs.content
        assert [t.token for t in tokens] == [t.token for t in expected]
        assert [t.logprob for t in tokens] == pytest.approx([t.logprob for t in expected], abs=1e-4)
        assert all(len(t.top_logprobs) == 2 for t in tokens)
    assert {chunk.id for chunk in chunks} == {chunks[0].id}


def test_log_probabilities_name_the_chosen_token_and_its_rivals(api):
    [choice] = _ask(api, logprobs=True, top_logprobs=3).choices
    for token in choice.logprobs.content:
        assert [t.logprob for t in token.top_logprobs] == sorted(
            (t.logprob for t in token.top_logprobs), reverse=True
        )
        assert token.top_logprobs[0].token == token.token  # greedy
        assert bytes(token.bytes).decode() == token.token
    assert "".join(token.token for token in choice.logprobs.content[:-1]) == "WEMM"
    [plain] = _ask(api, logprobs=True).choices
    assert all(token.top_logprobs == [] for token in plain.logprobs.content)


def test_structured_output_becomes_a_pydantic_model(api):
    class Shape(pydantic.BaseModel):
        """What is seen."""

        colour: str = pydantic.Field(pattern="^(red|blue|green)$")
        count: int = pydantic.Field(ge=0, le=6)

    completion = api.chat.completions.parse(
        model="nano", messages=conversation("shapes.png"), response_format=Shape, max_tokens=300
    )
    shape = completion.choices[0].message.parsed
    assert isinstance(shape, Shape)
    assert 0 <= shape.count <= 6


def test_guided_choice_regex_and_json_object(api):
    choice = _ask(api, "shapes.png", extra_body={"guided_choice": ["purple", "orange"]})
    assert choice.choices[0].message.content in ("purple", "orange")
    regex = _ask(api, "number.png", extra_body={"structured_outputs": {"regex": "[0-9]{2}"}})
    assert len(regex.choices[0].message.content) == 2
    anything = _ask(api, response_format={"type": "json_object"}, max_tokens=40, stop=["}"])
    assert anything.choices[0].message.content.startswith("{")


def test_stop_seed_bias_and_limits_are_honoured(api):
    assert _ask(api, stop=["M"]).choices[0].message.content == "WE"
    assert _ask(api, max_tokens=1).choices[0].finish_reason == "length"
    sampled = [_ask(api, "shapes.png", temperature=1.5, seed=-7, max_tokens=20) for _ in range(2)]
    assert sampled[0].choices[0].message.content == sampled[1].choices[0].message.content
    w = _ask(api, logprobs=True).choices[0].logprobs.content[0]
    token_id = Tokenizer(BUNDLED_DIRECTORY / "nano").encode("assistant\nW")[-1]
    biased = _ask(api, logprobs=True, logit_bias={str(token_id): -100}, max_tokens=8)
    assert biased.choices[0].logprobs.content[0].token != w.token


def test_a_conversation_goes_on(api):
    turns = conversation("shapes.png")
    first = api.chat.completions.create(model="nano", messages=turns)
    turns += [
        {"role": "assistant", "content": first.choices[0].message.content},
        {"role": "user", "content": "心形是什么颜色的？"},
    ]
    second = api.chat.completions.create(model="nano", messages=turns)
    assert second.choices[0].message.content == "绿色"
    assert second.usage.prompt_tokens_details.cached_tokens >= 16


def test_several_images_keep_their_order(api):
    """Two images in one message make another prompt than the same two the other way round."""

    def tokens(*names):
        content = [*map(image_part, names), {"type": "text", "text": "?"}]
        [choice] = api.chat.completions.create(
            model="nano", messages=[{"role": "user", "content": content}], max_tokens=8, logprobs=True
        ).choices
        return [token.logprob for token in choice.logprobs.content]

    assert tokens("word.png", "shapes.png") == pytest.approx(tokens("word.png", "shapes.png"), abs=1e-4)
    assert tokens("word.png", "shapes.png") != pytest.approx(tokens("shapes.png", "word.png"), abs=1e-2)


def test_low_detail_takes_fewer_image_tokens(api):
    def image_tokens(**more):
        content = [image_part("shapes.png", **more), {"type": "text", "text": "What colour is the star?"}]
        completion = api.chat.completions.create(model="nano", messages=[{"role": "user", "content": content}])
        return completion.usage.prompt_tokens_details.image_tokens

    assert image_tokens(detail="high") == image_tokens(detail="auto") == image_tokens()
    assert image_tokens(detail="low") < image_tokens(detail="high")


def test_completions_continue_text_and_token_ids(api, client):
    def complete(prompt, **options):
        more = {"ignore_eos": True}
        return api.completions.create(model="nano", prompt=prompt, max_tokens=5, extra_body=more, **options)

    [choice] = complete("What colour", logprobs=2, echo=False).choices
    assert choice.finish_reason == "length"
    # Ends that are gone past have a name among the tokens, and no text.
    assert "".join(choice.logprobs.tokens).replace("<|im_end|>", "") == choice.text
    ids = client.post("/tokenize", json={"prompt": "What colour"}).json()["tokens"]
    assert complete(ids).choices[0].text == choice.text
    both = complete(["What colour", "What colour"], n=2, echo=True)
    assert [c.index for c in both.choices] == [0, 1, 2, 3]
    assert {c.text for c in both.choices} == {"What colour" + choice.text}
    best = complete("What", temperature=2.0, best_of=4, seed=3)
    assert len(best.choices) == 1
    assert best.choices[0].logprobs is None
    texts = ["", ""]
    for chunk in complete(["What colour"] * 2, stream=True):
        for part in chunk.choices:
            texts[part.index] += part.text
    assert texts == [choice.text] * 2


def test_models(api):
    assert [model.id for model in api.models.list()] == ["nano"]
    assert api.models.retrieve("nano").max_model_len == 1024
    with pytest.raises(openai.NotFoundError, match="'other' is not served here; it is 'nano'"):
        api.models.retrieve("other")
    with pytest.raises(openai.NotFoundError):
        api.chat.completions.create(model="other", messages=conversation("word.png"))


def test_tokenize_counts_images_and_detokenize_gives_the_text_back(client):
    counted = client.post("/tokenize", json={"messages": conversation("word.png")}).json()
    answered = client.post("/v1/chat/completions", json={"messages": conversation("word.png")}).json()
    assert counted["count"] == len(counted["tokens"]) == answered["usage"]["prompt_tokens"]
    assert counted["image_tokens"] == counted["tokens"].count(-200)
    tokens = client.post("/tokenize", json={"prompt": "图中有 a cat 吗？"}).json()["tokens"]
    assert "图中有 a cat 吗？" in client.post("/detokenize", json={"tokens": tokens}).json()["prompt"]


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"temperature": -1}, "temperature", r"temperature must be a finite number in \[0, 10000\]. Given: -1"),
        ({"top_p": 1.1}, "top_p", "top_p"),
        ({"max_tokens": 0}, "max_tokens", r"max_tokens must be an integer in \[1, 2147483647\]. Given: 0"),
        ({"max_tokens": "10"}, "max_tokens", "max_tokens: Input should be a valid integer. Given: '10'"),
        ({"max_tokens": True}, "max_tokens", "valid integer"),
        ({"n": 10**6}, "n", "n must be"),
        ({"stop": [""]}, "stop", "stop string"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "token ids"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias", "vocab|must be in"),
        ({"top_logprobs": 3}, "top_logprobs", "needs logprobs"),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "pope", "content": "x"}]}, "messages[0].role", "pope"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
            "messages[0].content[0].text",
            "required",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "image": "/etc/passwd"}]}]},
            "messages[0].content[0]",
            "image_url",
        ),
        (
            {"messages": [{"role": "user", "content": [
                {"type": "text", "text": "x"}, {"type": "image_url", "image_url": {"url": "data:,x"}}]}]},
            "messages[0].content[1].image_url",
            "data:image/TYPE;base64",
        ),
        (
            {"messages": [{"role": "system", "content": [image_part("word.png")]},
                          {"role": "user", "content": "x"}]},
            "messages[0].content",
            "only the user's messages",
        ),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "needs json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}},
         "structured_outputs", "structured_outputs.json"),
    ],
)  # fmt: skip
def test_mistakes_are_named(client, change, param, message):
    body = {"messages": conversation("word.png"), "max_tokens": 8, **change}
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert re.search(message, error["message"]), error["message"]
    assert client.post("/v1/chat/completions", json={"messages": conversation("word.png")}).status_code == 200


def test_a_prompt_that_is_too_long_says_by_how_much(api):
    with pytest.raises(openai.BadRequestError) as error:
        api.chat.completions.create(model="nano", messages=[{"role": "user", "content": "hi " * 2000}])
    assert error.value.code == "context_length_exceeded"
    assert "leaves room for 1023" in str(error.value)


def test_unknown_keys_are_let_through(api):
    completion = _ask(api, user="me", metadata={"a": "b"}, store=False, extra_body={"invented": [1, {"x": None}]})
    assert completion.choices[0].message.content == "WEMM"


def test_a_client_that_gives_up_frees_its_place(api, client):
    with pytest.raises(openai.APITimeoutError):
        _ask(api, extra_body={"ignore_eos": True, "repetition_guard": False}, max_tokens=900, timeout=0.3)
    stream = _ask(api, extra_body={"ignore_eos": True, "repetition_guard": False}, max_tokens=900, stream=True)
    next(iter(stream))
    stream.close()
    for _ in range(500):
        page = client.get("/metrics").text
        if 'wemm_requests_running{model_name="nano"} 0.0' in page:
            break
        time.sleep(0.02)
    else:
        raise AssertionError(page)
    assert 'wemm_cancelled_total{model_name="nano",stage="generate"}' in page


def test_the_requests_own_time_limit(api):
    with pytest.raises(openai.InternalServerError) as error:
        _ask(api, max_tokens=900, extra_body={"timeout": 0.01, "ignore_eos": True, "repetition_guard": False})
    assert error.value.status_code == 504
    assert error.value.code == "timeout"
