"""What bodies may say, and what a prompt is."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("fastapi")

from pydantic import TypeAdapter, ValidationError

from wemm.errors import ParameterError
from wemm.server.mindie import protocol
from wemm.server.mindie.prompt import read_prompt

GENERATE = TypeAdapter(protocol.GenerateRequest)
TENSOR = {"name": "input0", "shape": [1, 2], "datatype": "UINT32", "data": [1, 2]}
BODIES = {
    "tgi": (protocol.TgiRequest, {"inputs": "x"}, "parameters"),
    "own": (protocol.InferRequest, {"inputs": "x"}, "parameters"),
    "triton": (protocol.TritonRequest, {"text_input": "x"}, "parameters"),
    "tensor": (protocol.TensorRequest, {"inputs": [TENSOR], "outputs": [{"name": "o"}]}, "parameters"),
    "vllm": (protocol.VllmRequest, {"prompt": "x"}, None),
}


def _parse(dialect, **parameters):
    model, body, place = BODIES[dialect]
    return model.model_validate({**body, **({place: parameters} if place else parameters)})


@pytest.mark.parametrize(
    ("dialects", "name", "good", "bad"),
    [
        ("tgi own triton tensor", "temperature", [1e-3, 1, 2.5, None], [0, -1, "1", True]),
        ("vllm", "temperature", [0, 1, None], [-0.1, "1"]),
        ("tgi own vllm", "top_k", [-1, 1, 2**31 - 1, None], [0, -2, 2**31, 1.5, True]),
        ("triton tensor", "top_k", [0, 1, None], [-1, 2**31]),
        ("tgi own", "top_p", [0.01, 0.99, None], [0, 1, 1.1]),
        ("triton tensor vllm", "top_p", [0.01, 1, None], [0, 1.01]),
        ("tgi own triton tensor", "typical_p", [0.5, 1, None], [0, 1.1]),
        ("tgi own triton tensor", "max_new_tokens", [1, 2**31 - 1, None], [0, -1, 2**31, 1.0]),
        ("vllm", "max_tokens", [1, 2**31 - 1, None], [0, 2**31]),
        ("tgi own triton tensor vllm", "seed", [0, 2**63 - 1, None], [-1, 2**63, "1"]),
        ("tgi own triton tensor vllm", "repetition_penalty", [0.1, 2.5, None], [0, -1]),
        ("vllm", "presence_penalty", [-2, 2, None], [-2.1, 2.1]),
        ("vllm", "frequency_penalty", [-2, 2, None], [-2.1, 2.1]),
        ("tgi own triton tensor", "do_sample", [True, False, None], [0, "true"]),
        ("tgi own triton tensor", "details", [True, False, None], [1]),
        ("own triton tensor", "priority", [1, 5, None], [0, 6, "1"]),
        ("own triton tensor", "timeout", [1, 65535, None], [0, 65536, 1.5]),
        ("tgi", "truncate", [1, None], [0, -1]),
        ("triton tensor", "batch_size", [1, 100, None], [0]),
        ("tgi vllm", "stop", ["a", ["a", "b"], ["x" * 1024] * 32, [], None],
         ["", [""], "x" * 1025, ["x" * 1024] * 33, 3]),
        ("vllm", "n", [1, 128, None], [0, 129]),
        ("vllm", "best_of", [1, 128, None], [0, 129]),
    ],
)  # fmt: skip
def test_ranges(dialects, name, good, bad):
    for dialect in dialects.split():
        for value in good:
            _parse(dialect, **{name: value})
        for value in bad:
            with pytest.raises(ValidationError):
                _parse(dialect, **{name: value})


@pytest.mark.parametrize("dialect", BODIES)
def test_other_keys_are_let_through(dialect):
    _parse(dialect, colour="red")
    model, body, _ = BODIES[dialect]
    model.model_validate({**body, "colour": "red"})


@pytest.mark.parametrize("dialect", ["own", "triton", "tensor"])
def test_ids(dialect):
    model, body, _ = BODIES[dialect]
    for value in ("a", "A-z_9", "x" * 256, None):
        model.model_validate({**body, "id": value})
    for value in ("", "x" * 257, "a b", "ä", "a\n", 7):
        with pytest.raises(ValidationError):
            model.model_validate({**body, "id": value})


def test_generate_is_for_tgi_or_for_vllm():
    assert type(GENERATE.validate_python({"inputs": "x"})) is protocol.TgiRequest
    assert type(GENERATE.validate_python({"prompt": "x"})) is protocol.VllmRequest
    assert type(GENERATE.validate_python({"prompt": "x", "inputs": None})) is protocol.VllmRequest
    for body in ({}, {"inputs": "x", "prompt": "y"}, {"inputs": None}, [], "x"):
        with pytest.raises(ValidationError, match=r"must have either inputs \(TGI\) or prompt \(vLLM\)"):
            GENERATE.validate_python(body)


@pytest.mark.parametrize(
    "inputs", ["", [], [{"type": "text"}], [{"text": "x"}], [{"type": "video_url"}], 3, ["x"]]
)
def test_what_is_no_prompt(inputs):
    with pytest.raises(ValidationError):
        protocol.TgiRequest.model_validate({"inputs": inputs})


@pytest.mark.parametrize(
    "change",
    [
        {"shape": []},
        {"shape": [1, 1, 2]},
        {"datatype": "INT64"},
        {"data": []},
        {"data": [1.5]},
        {"name": "x" * 257},
    ],
)
def test_what_is_no_tensor(change):
    with pytest.raises(ValidationError):
        protocol.TensorRequest.model_validate({"inputs": [{**TENSOR, **change}], "outputs": [{"name": "o"}]})
    with pytest.raises(ValidationError):
        protocol.TensorRequest.model_validate({"inputs": [TENSOR, TENSOR], "outputs": [{"name": "o"}]})


def _prompt(inputs):
    return read_prompt(protocol.TgiRequest.model_validate({"inputs": inputs}).inputs, "inputs")


def _urls(inputs):
    [message] = _prompt(inputs).source
    return [part["image_url"]["url"] for part in message["content"] if part["type"] == "image_url"]


def test_text_is_raw():
    prompt = _prompt("Why?")
    assert (prompt.source, prompt.text, prompt.has_images) == ("Why?", "Why?", False)


def test_parts_are_one_message_in_the_order_given():
    parts = [
        {"type": "text", "text": "a"},
        {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA==", "detail": "low"}},
        {"type": "text", "text": "b"},
    ]
    prompt = _prompt(parts)
    assert prompt.source == [{"role": "user", "content": parts}]
    assert prompt.text == "a\nb"
    assert prompt.has_images
    assert not _prompt(parts[:1]).has_images
    assert _prompt(json.dumps(parts)) == prompt
    assert _prompt(json.dumps(parts) + "\n") == prompt


@pytest.mark.parametrize(
    "text",
    [
        "[1, 2]",
        '["a"]',
        "[]",
        "[",
        "[x]",
        '[{"type": "cat"}]',
        '[{"text": "a"}]',
        "[[" * 99 + "]]" * 99,
        ' [{"a": 1}]',
    ],
)
def test_a_text_that_only_looks_like_parts_is_text(text):
    assert _prompt(text).source == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"type": "video_url", "video_url": "x"}]', r"inputs\[0\]: .*video_url"),
        (
            '[{"type": "text", "text": "a"}, {"type": "text", "text": 3}]',
            r"inputs\[1\]: Input should be a valid string",
        ),
        ('[{"type": "image_url"}]', r"inputs\[0\]: Field required"),
    ],
)
def test_parts_that_are_spelled_wrong_are_no_text(text, message):
    with pytest.raises(ParameterError, match=message):
        _prompt(text)


@pytest.mark.parametrize(
    ("url", "full"),
    [
        ("data:image/png;base64,AA==", "data:image/png;base64,AA=="),
        ("https://example.com/a.jpg", "https://example.com/a.jpg"),
        ("file:///data/a.jpg", "file:///data/a.jpg"),
        ("/9j/4AAQSkZJRg==", "data:image/jpeg;base64,/9j/4AAQSkZJRg=="),
        ("iVBORw0KGgo=", "data:image/jpeg;base64,iVBORw0KGgo="),
        ("/data/multimodal_inputs/a b.jpg", "file:///data/multimodal_inputs/a%20b.jpg"),
        ("a.jpg", "a.jpg"),
    ],
)
def test_an_image_may_be_bare_base64_or_a_path(url, full):
    assert _urls([{"type": "image_url", "image_url": url}]) == [full]
    assert _urls([{"type": "image_url", "image_url": {"url": url}}]) == [full]
