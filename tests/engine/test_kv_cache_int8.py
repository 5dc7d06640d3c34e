"""A KV cache of int8: half the memory, the same sequences however they were computed, answers that stay."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from wemm import LLM, SamplingParams
from wemm.cost import kv_bytes_per_token
from wemm.errors import ParameterError
from wemm.quantization import dequantize_kv, quantize_kv

PARAMS = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
INT8 = dict(device="cpu", dtype="float32", kv_cache_dtype="int8", max_model_len=400)


def _ids(outputs):
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def work(ask, golden_images):
    return [
        ask("What is this?", golden_images / "300x200.png"),
        ask("为什么大海是蓝色的？"),
        ask("What is this?", golden_images / "300x200.png", golden_images / "33x21.png"),
    ]


@pytest.fixture(scope="module")
def alone(work):
    with LLM("nano", **INT8, enable_prefix_caching=False) as llm:
        return [_ids(llm.chat(messages, PARAMS))[0] for messages in work]


def test_a_vector_is_kept_to_half_a_step_of_its_largest():
    x = torch.randn(5, 3, 128) * torch.tensor([1e-3, 1.0, 500.0]).unsqueeze(-1)
    step = x.abs().amax(-1, keepdim=True) / 127
    assert ((dequantize_kv(quantize_kv(x)) - x).abs() <= 0.501 * step).all()
    assert torch.equal(dequantize_kv(quantize_kv(torch.zeros(2, 8))), torch.zeros(2, 8))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_so(bad):
    """So that the engine refuses it by stage, as it does without a cache."""
    x = torch.ones(2, 8)
    x[1, 3] = bad
    kept = dequantize_kv(quantize_kv(x))
    assert kept[0].isfinite().all()
    assert not kept[1].isfinite().any()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_batched_tokens": 7},
        {"block_size": 3},
        {"tensor_parallel_size": 2},
        {"num_speculative_tokens": 0},
    ],
    ids=["together", "in chunks", "odd blocks", "two ranks", "no guesses"],
)
def test_however_they_are_computed_the_answers_are_those_alone(options, work, alone):
    with LLM("nano", **INT8, **options) as llm:
        assert _ids(llm.chat(work, PARAMS)) == alone
        assert _ids(llm.chat(work, PARAMS)) == alone  # from the prefix cache


def test_it_answers_as_the_float_cache_does(ask):
    question = ask("What word is written here?", Path(__file__).parents[2] / "docs/images/word.png")
    for quantization in (None, "int8", "int4"):
        with LLM("nano", **INT8, quantization=quantization) as llm:
            assert llm.chat(question, SamplingParams(max_tokens=8))[0].outputs[0].text == "WEMM"


def test_the_plan_counts_its_scales():
    with LLM("nano", **INT8) as llm:
        cache = llm._open.engine._runner._kv_cache
        assert cache.dtype is torch.int8
        plan, config = llm._open.memory_plan, llm._open.source.config
        assert plan.kv_cache == cache.numel() == plan.kv_tokens * kv_bytes_per_token(config, "int8")
        assert kv_bytes_per_token(config, "int8") < 0.7 * kv_bytes_per_token(config, "bfloat16")


def test_other_dtypes_are_refused():
    with pytest.raises(ParameterError, match="kv_cache_dtype must be auto or int8. Given: 'fp8'"):
        LLM("nano", kv_cache_dtype="fp8")
