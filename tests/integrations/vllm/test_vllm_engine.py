"""vLLM with the plugin answers as our engine does, whatever it batches, cuts, caches or shares."""

from __future__ import annotations

import os

import pytest

from tests.integrations.vllm.engines import answers, assert_same, vllm_engine
from wemm.checkpoint.checkpoint import BUNDLED_DIRECTORY

pytestmark = pytest.mark.vllm
TINY = BUNDLED_DIRECTORY / "tiny"


@pytest.mark.parametrize("name", ["tiny", "nano"])
def test_one_by_one_batched_and_from_the_prefix_cache(name, conversations, ours):
    expected = ours(BUNDLED_DIRECTORY / name)
    with vllm_engine(BUNDLED_DIRECTORY / name, enable_prefix_caching=True) as engine:
        for conversation, ours_alone in zip(conversations, expected, strict=True):
            assert assert_same(ours_alone, answers(engine, [conversation])[0])
        cached = answers(engine, conversations)
        assert sum(output.num_cached_tokens > 0 for output in cached) >= 4
        engine.reset_prefix_cache()
        for output in (cached, answers(engine, conversations)):
            for ours_alone, theirs in zip(expected, output, strict=True):
                assert assert_same(ours_alone, theirs)


def test_golden_cases(golden, golden_images, ask):
    """Ids of the reference wherever its margin exceeds 1e-3."""
    cases = [case for case in golden["cases"] if case["prompt_len"]]
    with vllm_engine(TINY) as engine:
        images = [[golden_images / case["image"]] if case["image"] else [] for case in cases]
        asked = [ask(case["text"], *shown) for case, shown in zip(cases, images, strict=True)]
        for case, theirs in zip(cases, answers(engine, asked), strict=True):
            expected = case["greedy_token_ids"][: len(theirs.outputs[0].token_ids)]
            close = [i for i, margin in enumerate(case["greedy_margins"]) if margin <= 1e-3]
            comparable = min([*close, len(expected)])
            assert comparable > 0
            assert list(theirs.outputs[0].token_ids[:comparable]) == expected[:comparable]
            assert len(theirs.prompt_token_ids) == case["prompt_len"]


@pytest.mark.parametrize("chunk", [8, 13, 40])
def test_chunks_that_cut_images(chunk, conversations, ours):
    """Prompts of 18 to 130 tokens; other requests decode beside the chunks."""
    with vllm_engine(TINY, max_num_batched_tokens=chunk) as engine:
        for ours_alone, theirs in zip(ours(TINY), answers(engine, conversations), strict=True):
            assert assert_same(ours_alone, theirs)


@pytest.mark.parametrize(
    "options",
    # On CPUs, vLLM makes room for what stages exchange only while it warms up a compiled model.
    [
        {"tensor_parallel_size": 2},
        {"tensor_parallel_size": 2, "mm_encoder_tp_mode": "data", "max_num_batched_tokens": 512},
        {"pipeline_parallel_size": 2, "enforce_eager": False},
    ],
    ids=["tensor", "images", "pipeline"],
)
def test_two_ranks(options, conversations, ours, monkeypatch):
    cpus = sorted(os.sched_getaffinity(0)) * 2
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{cpus[0]}|{cpus[1]}")  # by itself vLLM asks for NUMA nodes
    with vllm_engine(TINY, **{"max_num_batched_tokens": 40, **options}) as engine:
        for ours_alone, theirs in zip(ours(TINY), answers(engine, conversations), strict=True):
            assert assert_same(ours_alone, theirs)


def test_compiled(conversations, ours):
    with vllm_engine(TINY, enforce_eager=False) as engine:
        for ours_alone, theirs in zip(ours(TINY), answers(engine, conversations), strict=True):
            assert assert_same(ours_alone, theirs)
