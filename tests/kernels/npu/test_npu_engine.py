"""A whole engine over the kernels for NPUs: the golden answers, and in float16 those of the definitions."""

from __future__ import annotations

from pathlib import Path

import pytest

from wemm import LLM, SamplingParams
from wemm.kernels import release_memory
from wemm.kernels.npu import once_per_step
from wemm.ops.registry import OPS

IMAGES = Path(__file__).parents[3] / "docs/images"
FUSED_ATTENTION = "npu_fused_infer_attention_score_v2"
EAGER = dict(device="cpu", enforce_eager=True)


def _called(stub):
    return {name for name, _, _ in stub.calls}


@pytest.mark.parametrize(("dtype", "margin"), [("float32", 1e-3), ("float16", 0.02)])
def test_golden_answers(on_stub, golden, golden_images, ask, dtype, margin):
    """Same ids wherever the reference's margin is wider. The decoder's head_dim, 8, is left to the definitions."""
    with LLM("tiny", dtype=dtype, **EAGER) as llm:
        for case in [case for case in golden["cases"] if case["prompt_len"]]:
            images = [golden_images / case["image"]] if case["image"] else []
            params = SamplingParams(max_tokens=len(case["greedy_token_ids"]), ignore_eos=True)
            [output] = llm.chat(ask(case["text"], *images), params)
            close = [i for i, reference in enumerate(case["greedy_margins"]) if reference <= margin]
            comparable = close[0] if close else len(case["greedy_token_ids"])
            assert list(output.outputs[0].token_ids[:comparable]) == case["greedy_token_ids"][:comparable]
    everywhere = {"npu_rms_norm", "npu_rotary_mul", "npu_scatter_nd_update_", "npu_swiglu"}
    assert _called(on_stub) == everywhere | ({FUSED_ATTENTION} if dtype == "float16" else set())


QUESTIONS = [
    ("word.png", "What word is written here?"),
    ("number.png", "图中的数字是多少？"),
    ("shapes.png", "How many circles are there?"),
]


@pytest.mark.parametrize("block_size", [16, 128])
@pytest.mark.parametrize("quantization", [None, "int8"])
def test_answers_of_nano_in_float16(on_stub, monkeypatch, ask, block_size, quantization):
    """Chunks beside decodes, prefixes shared, several questions in one step."""
    asked = [ask(question, IMAGES / image) for image, question in QUESTIONS * 2]
    options = dict(
        EAGER, dtype="float16", quantization=quantization, block_size=block_size, max_num_batched_tokens=64
    )
    with LLM("nano", **options) as llm:
        answers = [output.outputs[0].text for output in llm.chat(asked, SamplingParams(max_tokens=8))]
    assert [answer.strip() for answer in answers] == ["WEMM", "2048", "3"] * 2
    expected = {FUSED_ATTENTION, "npu_rms_norm", "npu_rotary_mul"}
    expected |= {"npu_scatter_nd_update_", "npu_swiglu"}
    expected |= {"npu_dynamic_quant", "npu_quant_matmul"} if quantization else set()
    assert _called(on_stub) == expected
    attention = [k for name, _, k in on_stub.calls if name == FUSED_ATTENTION]
    assert any(k["sparse_mode"] == 3 for k in attention)
    assert any(k["block_table"] is not None for k in attention)
    with monkeypatch.context() as patch:
        for op in OPS.values():
            patch.setattr(op, "implementations", [])
        with LLM("nano", **options) as llm:
            assert [output.outputs[0].text for output in llm.chat(asked, SamplingParams(max_tokens=8))] == answers


def test_lengths_are_read_once_per_step(on_stub, monkeypatch, ask):
    """However many layers: reading them waits for the device."""
    reads = []
    monkeypatch.setattr(once_per_step.as_list, "_function", lambda t: reads.append(t) or t.tolist())
    with LLM("nano", dtype="float16", num_speculative_tokens=0, **EAGER) as llm:
        reads.clear()
        [output] = llm.chat(ask("Once upon a time"), SamplingParams(max_tokens=9, ignore_eos=True))
        assert len(output.outputs[0].token_ids) == 9
        layers = llm._open.engine._runner.model.language_model.layers
        assert len(layers) > 1
    assert len(reads) == 2 + 8  # bounds and lengths of the prompt, then lengths of each decode


def test_what_is_kept_is_let_go(on_stub, ask):
    with LLM("nano", dtype="float16", **EAGER) as llm:
        llm.chat(ask("Hello"), SamplingParams(max_tokens=2))
        assert once_per_step.as_list._kept
        release_memory("npu")
    assert not any(function._kept for function in once_per_step._ALL)
