"""The float32 side computes what the engine computes, and holds one module's weights at a time."""

from __future__ import annotations

import math

import pytest
import torch

from wemm import LLM
from wemm.checkpoint.checkpoint import BUNDLED_DIRECTORY, open_checkpoint
from wemm.config import QuantizationConfig
from wemm.doctor import reference as reference_module
from wemm.doctor.canaries import CANARIES, Scorer, conversation
from wemm.doctor.counterfactuals import candidates, explains, try_out
from wemm.doctor.reference import Reference, Sample
from wemm.doctor.stages import Depth, Precision, compare
from wemm.doctor.text import INTERNLM2_VOCAB_SIZE, check_tokenizer
from wemm.processing.tokenizer import Tokenizer
from wemm.request import SamplingParams

NANO = BUNDLED_DIRECTORY / "nano"


@pytest.fixture(scope="module")
def checkpoint():
    return open_checkpoint(NANO)


@pytest.fixture
def reference(checkpoint):
    return Reference(checkpoint, torch.device("cpu"))


@pytest.fixture(scope="module")
def engine():
    with LLM("nano", dtype="float32", device="cpu") as llm:
        yield llm


def _samples(engine):
    prompts = [
        engine._open.processor.chat(conversation(canary, engine._open.source.config)) for canary in CANARIES
    ]
    return [Sample(prompt.token_ids, prompt.image_spans, 1) for prompt in prompts]


def test_it_is_the_engine_in_float32(reference, engine):
    """First-token log probabilities of all canaries; questions about one picture share its tokens."""
    samples = _samples(engine)
    embeds = [reference.visual_embeds(sample.image_spans[0]) for sample in samples]
    logits = reference.logits(samples, embeds)
    conversations = [conversation(canary, engine._open.source.config) for canary in CANARIES]
    outputs = engine.chat(conversations, SamplingParams(max_tokens=1, logprobs=3))
    for rows, output in zip(logits, outputs, strict=True):
        [logprobs] = output.outputs[0].logprobs
        expected = rows[0].log_softmax(-1)
        for token_id, given in logprobs.items():
            assert given.logprob == pytest.approx(expected[token_id].item(), abs=1e-4)


def test_a_shared_picture_is_computed_once_and_gives_the_same(reference, engine):
    samples = _samples(engine)[:2]
    assert samples[0].image_spans[0].image.sha256 == samples[1].image_spans[0].image.sha256
    embeds = [reference.visual_embeds(sample.image_spans[0]) for sample in samples]
    rows = []
    handle = reference.model.language_model.output.register_forward_hook(lambda *_: rows.append(seen[-1]))
    seen = []
    layer = reference.model.language_model.layers[0].register_forward_pre_hook(lambda m, x: seen.append(len(x[0])))
    together = reference.logits(samples, embeds)
    alone = [reference.logits([s], [e])[0] for s, e in zip(samples, embeds, strict=True)]
    handle.remove()
    layer.remove()
    assert rows[0] < rows[1] + rows[2] - samples[0].image_spans[0].image.plan.num_tokens
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_one_module_at_a_time_is_in_memory(checkpoint, engine, monkeypatch):
    """What a large model needs: before and after a pass every weight but the separators is on the meta device."""
    monkeypatch.setattr(reference_module, "SMALL", 0)
    reference = Reference(checkpoint, torch.device("cpu"))
    most = 0

    def watch(*_):
        nonlocal most
        loaded = [p for p in reference.model.parameters() if not p.is_meta]
        most = max(most, sum(parameter.numel() for parameter in loaded))

    for module in reference.model.modules():
        module.register_forward_hook(watch)
        module.register_forward_pre_hook(watch)
    [sample, *_] = _samples(engine)
    reference.logits([sample], [reference.visual_embeds(sample.image_spans[0])])
    left = {name for name, parameter in reference.model.named_parameters() if not parameter.is_meta}
    assert left == {"separator_embedding.weight"}
    assert reference._kept == {}
    largest = max(module_size(module) for module in reference.model.modules())
    assert 0 < most <= largest + 2 * checkpoint.config.text.hidden_size


def module_size(module):
    return sum(parameter.numel() for parameter in module.parameters(recurse=False))


def test_a_change_ends_with_its_block(checkpoint, reference):
    """Every change moves the score and leaves nothing behind; none explains a sound checkpoint better."""
    scorer = Scorer(reference, checkpoint.config, Tokenizer(NANO))
    loaded = scorer.score()
    assert loaded.per_token < 0.01 * math.log(checkpoint.config.text.vocab_size)
    for group in candidates(checkpoint, []):
        for change in group[:4]:
            changed = try_out(change, reference, scorer)
            assert changed.losses != loaded.losses, change.name
            assert not explains(changed, loaded, checkpoint.config.text.vocab_size)
    assert scorer.score() == loaded


def test_the_limit_grows_with_depth_and_with_the_rounding():
    def limit(dtype, depth, **schemes):
        return Precision(dtype, QuantizationConfig(**schemes)).limit(depth)

    shallow, deep = Depth(10, 4, 4), Depth(60, 27, 32)
    assert limit("float32", deep) == 1e-4
    assert limit("float16", shallow) < limit("bfloat16", shallow) < limit("bfloat16", deep) < 0.2
    assert limit("float32", shallow) < limit("float32", shallow, language="int8") < 0.1
    assert limit("float32", shallow, language="int8") < limit("float32", shallow, language="int4")
    assert limit("bfloat16", Depth(10, 4, 0), language="int4") == limit("bfloat16", Depth(10, 4, 0))


def test_one_bad_row_is_seen():
    """Fifty thousand good rows do not hide it."""
    torch.manual_seed(0)
    oracle = torch.randn(50_000, 64)
    given = oracle.clone()
    assert compare("x", given, oracle, allowed=0.014).is_ok
    given[500] = torch.randn(64)
    assert not compare("x", given, oracle, allowed=0.014).is_ok
    given[500] = float("nan")
    assert not compare("x", given, oracle, allowed=0.014).is_ok


def test_a_vocabulary_of_internlm2s_size_must_be_internlm2s(checkpoint, monkeypatch):
    """Its SHA-256, else its way to encode; nano's vocabulary, called that large, is refused."""
    from dataclasses import replace

    from wemm.doctor import text

    monkeypatch.setattr(text, "INTERNLM2_VOCAB_SIZE", checkpoint.config.text.vocab_size)
    check, _ = check_tokenizer(NANO, checkpoint.config)
    assert check.status == "fail"
    assert "InternLM2's tokenizer gives" in check.detail
    monkeypatch.setattr(text, "INTERNLM2_SHA256", check.figures["sha256"])
    check, _ = check_tokenizer(NANO, checkpoint.config)
    assert check.status == "ok"
    assert "published file of InternLM2" in check.detail
    wider = replace(checkpoint.config, text=replace(checkpoint.config.text, vocab_size=INTERNLM2_VOCAB_SIZE))
    assert "768 pieces, but vocab_size 92544" in check_tokenizer(NANO, wider)[0].detail
