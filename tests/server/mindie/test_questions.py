"""Bodies → questions: defaults, when answers are drawn, what is refused."""

from __future__ import annotations

import pytest

pytest.importorskip("fastapi")

from wemm.checkpoint.checkpoint import BUNDLED_DIRECTORY
from wemm.errors import ParameterError, PromptTooLongError
from wemm.processing.processor import Processor
from wemm.processing.tokenizer import Tokenizer
from wemm.request import SamplingParams
from wemm.server.mindie import protocol
from wemm.server.mindie.prompt import Prompt
from wemm.server.mindie.questions import (
    tensor_question,
    text_question,
    tgi_question,
    token_question,
    vllm_question,
)

DEFAULT = SamplingParams(top_p=0.8, temperature=0.3)
TEXT = Prompt("x", "x")
IMAGE = Prompt([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}], "")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(BUNDLED_DIRECTORY / "nano")


def _own(**parameters):
    return text_question(TEXT, protocol.Parameters.model_validate(parameters), DEFAULT)


def _vllm(**body):
    return vllm_question(protocol.VllmRequest.model_validate({"prompt": "x", **body}), TEXT, DEFAULT, 512)


def test_defaults():
    question = text_question(TEXT, None, DEFAULT)
    assert (question.prompt, question.priority, question.timeout) == ("x", 0, None)
    params = question.params
    assert (params.max_tokens, params.temperature, params.top_p, params.logprobs) == (20, 0.0, 0.8, None)
    assert params.stop_strings == ()
    params = _vllm().params
    assert (params.max_tokens, params.temperature, params.n) == (512, 0.0, 1)
    question = _own(priority=1, timeout=30, max_new_tokens=3)
    assert (question.priority, question.timeout, question.params.max_tokens) == (-4, 30.0, 3)


@pytest.mark.parametrize(
    ("given", "temperature"),
    [
        ({}, 0.0),
        ({"do_sample": None}, 0.0),
        ({"do_sample": False}, 0.0),
        ({"do_sample": False, "temperature": 0.7}, 0.0),
        ({"do_sample": True}, 1.0),
        ({"do_sample": True, "temperature": 0.7}, 0.7),
        ({"temperature": 0.7}, 0.7),
        ({"top_k": 3}, 1.0),
        ({"top_p": 0.5}, 1.0),
        ({"seed": 3, "repetition_penalty": 1.2}, 0.0),
    ],
)
def test_answers_are_drawn_only_if_something_says_so(given, temperature):
    assert _own(**given).params.temperature == temperature
    if "do_sample" not in given:
        assert _vllm(**given).params.temperature == temperature


def test_vllm_is_greedy_at_temperature_0():
    assert _vllm(temperature=0, top_k=5).params.greedy


def test_names_and_values_arrive():
    given = {
        "temperature": 0.5,
        "top_k": 7,
        "top_p": 0.9,
        "seed": 11,
        "repetition_penalty": 1.5,
        "stop": ["a", "b"],
    }
    for params in (_own(**given).params, _vllm(**given).params):
        assert (params.temperature, params.top_k, params.top_p, params.seed) == (0.5, 7, 0.9, 11)
        assert (params.repetition_penalty, params.stop_strings) == (1.5, ("a", "b"))
    params = _vllm(
        presence_penalty=1,
        frequency_penalty=-1,
        ignore_eos=True,
        skip_special_tokens=False,
        stop_token_ids=[3],
        stop="x",
    ).params
    assert (params.presence_penalty, params.frequency_penalty, params.ignore_eos) == (1, -1, True)
    assert (params.skip_special_tokens, params.stop_token_ids, params.stop_strings) == (False, (3,), ("x",))


def test_seeds_are_drawn():
    seeds = {_own().params.seed for _ in range(3)} | {_vllm().params.seed for _ in range(3)}
    assert len(seeds) == 6
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    ("name", "neutral", "asking"),
    [
        ("typical_p", 1, 0.5),
        ("watermark", False, True),
        ("perf_stat", False, True),
        ("best_of", 1, 2),
        ("top_n_tokens", 0, 3),
        ("grammar", None, {"type": "json"}),
    ],
)
def test_what_cannot_be_done_is_refused(tokenizer, name, neutral, asking):
    model = (
        protocol.TgiParameters
        if hasattr(protocol.TgiParameters.model_validate({}), name)
        else protocol.TritonParameters
    )
    text_question(TEXT, model.model_validate({name: neutral}), DEFAULT)
    with pytest.raises(ParameterError, match=f"^{name} .* is not supported: ") as raised:
        text_question(TEXT, model.model_validate({name: asking}), DEFAULT)
    assert raised.value.param == name


@pytest.mark.parametrize("asking", [{"use_beam_search": True}, {"logprobs": 3}, {"logprobs": True}])
def test_what_vllm_cannot_have(asking):
    _vllm(use_beam_search=False, logprobs=False)
    with pytest.raises(ParameterError, match="is not supported"):
        _vllm(**asking)


def test_values_that_only_the_engine_refuses():
    with pytest.raises(ParameterError, match="temperature must be 0 or at least 1e-06"):
        _own(temperature=1e-9)
    with pytest.raises(ParameterError, match="stop takes at most 64 strings"):
        _own(stop=["x"] * 65)


def test_vllm_draws_best_of_and_returns_n():
    assert _vllm(n=3, temperature=1).params.n == 3
    question = _vllm(n=2, best_of=4, temperature=1)
    assert (question.params.n, question.params.logprobs) == (4, 0)
    assert _vllm(best_of=4, temperature=1).params.n == 4
    with pytest.raises(ParameterError, match="best_of must be at least n. Given: best_of 1, n 2"):
        _vllm(n=2, best_of=1, temperature=1)
    with pytest.raises(ParameterError, match="cannot be streamed"):
        _vllm(n=1, best_of=2, temperature=1, stream=True)
    for greedy in ({}, {"temperature": 0}):
        with pytest.raises(ParameterError, match="need a temperature above 0"):
            _vllm(n=2, **greedy)


def _tgi(tokenizer, prompt=TEXT, stream=False, **parameters):
    return tgi_question(prompt, protocol.TgiParameters.model_validate(parameters), DEFAULT, tokenizer, stream)


def test_tgi_asks_for_log_probabilities_where_it_shows_them(tokenizer):
    assert _tgi(tokenizer).params.logprobs is None
    assert _tgi(tokenizer, details=True).params.logprobs == 0
    assert _tgi(tokenizer, stream=True).params.logprobs == 0


def test_tgi_refuses_what_an_image_has_not(tokenizer):
    for given in ({"truncate": 5}, {"decoder_input_details": True}):
        _tgi(tokenizer, **given)
        with pytest.raises(ParameterError, match="is for text alone"):
            _tgi(tokenizer, IMAGE, **given)
    with pytest.raises(ParameterError, match="cannot be streamed"):
        _tgi(tokenizer, stream=True, decoder_input_details=True)
    question_in_words = Prompt([{"role": "user", "content": [{"type": "text", "text": "x"}]}], "x")
    with pytest.raises(ParameterError, match="truncate is for raw text"):
        _tgi(tokenizer, question_in_words, truncate=5)
    for name in (None, "", "None"):
        _tgi(tokenizer, adapter_id=name)
    with pytest.raises(ParameterError, match="there are no adapters"):
        _tgi(tokenizer, adapter_id="mine")


def test_truncation_keeps_the_end(tokenizer):
    processor = Processor(tokenizer, None, 8, tokenizer.vocab_size)
    text = "the quick brown fox jumps over the lazy dog " * 3
    ids = tokenizer.encode(text)
    with pytest.raises(PromptTooLongError):
        processor.text(text)
    for length in (1, 2, 8):
        process = _tgi(tokenizer, truncate=length).process(processor)
        assert process(text).token_ids == (tokenizer.bos_id, *ids[len(ids) - length + 1 :])
    short = _tgi(tokenizer, truncate=8).process(processor)
    assert short("a").token_ids == (tokenizer.bos_id, *tokenizer.encode("a"))
    with pytest.raises(PromptTooLongError):
        _tgi(tokenizer, truncate=9).process(processor)(text)


def test_token_ids_are_asked_as_they_are():
    question = token_question([1, 2], None, DEFAULT)
    assert (question.prompt, question.params.max_tokens) == ([1, 2], 20)


def _tensor(shape, data, inside=None, beside=None):
    body = {
        "inputs": [{"name": "i", "shape": shape, "datatype": "UINT32", "data": data, "parameters": inside}],
        "outputs": [{"name": "o"}],
        "parameters": beside,
    }
    return tensor_question(protocol.TensorRequest.model_validate(body), DEFAULT)


def test_tensors():
    for shape in ([3], [1, 3]):
        assert _tensor(shape, [5, 6, 7]).prompt == [5, 6, 7]
    for shape in ([2], [2, 3], [3, 1], [1, 4], [0], [-3]):
        with pytest.raises(ParameterError, match=r"inputs\[0\].shape must be \[3\] or \[1, 3\]"):
            _tensor(shape, [5, 6, 7])
    assert _tensor([1], [5], inside={"max_new_tokens": 4}).params.max_tokens == 4
    assert _tensor([1], [5], beside={"max_new_tokens": 4}).params.max_tokens == 4
    with pytest.raises(ParameterError, match="not in both"):
        _tensor([1], [5], {"seed": 1}, {"seed": 1})
