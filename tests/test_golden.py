"""Every golden case through the public door, at the stated tolerances."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from wemm import LLM, SamplingParams
from wemm.engine.model_input import ModelInput, VisualSlice
from wemm.engine.scheduler import VisionSlice
from wemm.processing.processor import ProcessedPrompt

GOLDEN = json.loads((Path(__file__).parent / "golden" / "golden.json").read_text())
CASES = [case for case in GOLDEN["cases"] if case["prompt_len"]]
IMAGE_CASES = [case for case in CASES if case["image"]]


def _name(case):
    return f"{case['image']}: {case['text']}"


def _conversation(case, golden_images, ask):
    images = [golden_images / case["image"]] if case["image"] else []
    return ask(case["text"], *images)


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_greedy_answer(llm, case, golden_images, ask):
    """Same ids wherever the reference's margin exceeds 1e-3 (nothing is comparable after a closer call)."""
    params = SamplingParams(max_tokens=len(case["greedy_token_ids"]), ignore_eos=True)
    [output] = llm.chat(_conversation(case, golden_images, ask), params)
    close = [i for i, margin in enumerate(case["greedy_margins"]) if margin <= 1e-3]
    comparable = close[0] if close else len(case["greedy_token_ids"])
    assert comparable > 0
    assert list(output.outputs[0].token_ids[:comparable]) == case["greedy_token_ids"][:comparable]
    assert len(output.prompt_token_ids) == case["prompt_len"]
    assert output.num_image_tokens == case.get("num_image_tokens", 0)
    assert list(output.prompt_token_ids).count(-200) == output.num_image_tokens
    if "prompt_token_ids" in case:
        assert list(output.prompt_token_ids) == case["prompt_token_ids"]
    if "greedy_text" in case and not close:
        assert output.outputs[0].text == case["greedy_text"]


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_first_token_logprobs(llm, case, golden_images, ask):
    """The five best logits agree up to the constant that log-softmax removes, to 1e-3 relative."""
    [output] = llm.chat(_conversation(case, golden_images, ask), SamplingParams(max_tokens=1, logprobs=5))
    logprobs = output.outputs[0].logprobs[0]
    best_id, best_logit = case["top5"][0]
    assert [token_id for token_id, _ in case["top5"]] == sorted(logprobs, key=lambda i: logprobs[i].rank)
    for token_id, logit in case["top5"]:
        difference = logprobs[token_id].logprob - logprobs[best_id].logprob
        assert math.isclose(difference, logit - best_logit, rel_tol=1e-3, abs_tol=1e-3 * abs(logit))


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_logits_and_image_embeddings(llm, case, golden_images, ask):
    """Norm of the last logits, norm and corners of the visual embeddings, to 1e-3 relative."""
    logits, embeds = _prefill(llm, llm._open.processor.chat(_conversation(case, golden_images, ask)))
    assert logits.norm().item() == pytest.approx(case["last_logits_norm"], rel=1e-3)
    for token_id, logit in case["top5"]:
        assert logits[token_id].item() == pytest.approx(logit, rel=1e-3)
    if case["image"]:
        assert embeds.norm().item() == pytest.approx(case["image_embed_norm"], rel=1e-3)
        first, last = embeds[1, :8], embeds[-2, -8:]  # of the grid, between the separators
        torch.testing.assert_close(first, torch.tensor(case["image_embed_first8"]), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(last, torch.tensor(case["image_embed_last8"]), rtol=1e-3, atol=1e-4)


def _prefill(llm: LLM, prompt: ProcessedPrompt) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logits [vocab_size] of the last prompt token and visual embeddings of the only image, by the runner."""
    runner = llm._open.engine._runner
    length = len(prompt.token_ids)
    images = tuple(span.image for span in prompt.image_spans)
    embeds = None
    if images:
        num_layers = llm._open.source.config.vision.num_hidden_layers
        assert runner.encode(VisionSlice(images, 0, num_layers, is_complete=True)) == [None]
        embeds = runner._visual_embeds[images[0].sha256]
    rows = [i for span in prompt.image_spans for i in range(span.start, span.stop)]
    forwarded = runner.forward(
        ModelInput(
            input_ids=np.array(prompt.token_ids),
            positions=np.arange(length),
            slot_mapping=np.arange(length),
            block_tables=np.arange(-(-length // 16), dtype=np.int32)[None],
            seq_lens=np.array([length], dtype=np.int32),
            logits_rows=np.array([length - 1]),
            cu_seqlens_q=np.array([0, length], dtype=np.int32),
            image_rows=np.array(rows, dtype=np.int64),
            visual_slices=tuple(VisualSlice(image.sha256, 0, image.plan.num_tokens) for image in images),
            pending_rows=np.empty(0, dtype=np.int64),
            pending_draws=np.empty(0, dtype=np.int64),
        )
    )
    assert forwarded.is_finite.all()
    return forwarded.logits[0], embeds


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_stays_close_to_float32(dtype, golden_images, ask):
    """Logits of every case within 5 % of the float32 norm; a 16-bit type cannot promise equal ids."""
    with LLM("tiny", dtype=dtype, device="cpu") as llm:
        for case in CASES:
            logits, _ = _prefill(llm, llm._open.processor.chat(_conversation(case, golden_images, ask)))
            for token_id, logit in case["top5"]:
                assert abs(logits[token_id].item() - logit) < 0.05 * abs(logit)


def test_user_text_yields_no_control_id(llm, golden, ask):
    """The last golden case: a literal <image> and the vocabulary's spelling of the stop token stay text."""
    text = golden["cases"][-1]["text"]
    [output] = llm.chat(ask(text), SamplingParams(max_tokens=1))
    control = set(golden["control_token_ids"].values())
    turn = [i for i in output.prompt_token_ids if i in control]
    names = golden["control_token_ids"]
    assert turn == [names["<|im_start|>"], names["<|im_end|>"], names["<|im_start|>"]]
    assert output.num_image_tokens == 0
