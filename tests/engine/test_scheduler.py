"""The scheduler's order, budget and preemption, without a model."""

from __future__ import annotations

import pytest

from wemm.engine.encoder_cache import EncoderCache
from wemm.engine.kv_cache import KVCacheManager
from wemm.engine.scheduler import Scheduler
from wemm.engine.sequence import Request, Sequence
from wemm.errors import IntegrityError
from wemm.processing.image_processor import ImagePlan, ProcessedImage
from wemm.processing.processor import ImageSpan, ProcessedPrompt
from wemm.request import SamplingParams


def _sequence(name, length, *image_hashes):
    plan = ImagePlan(resized=(28, 28), patch_grid=(2, 2), token_grid=(1, 1))
    spans = tuple(ImageSpan(i * 3, ProcessedImage(None, plan, sha256)) for i, sha256 in enumerate(image_hashes))
    prompt = ProcessedPrompt(tuple(range(length)), spans)
    return Sequence(name, Request(name, prompt, SamplingParams(), 0, 0.0), 0, None, None)


def _scheduler(num_blocks=100, max_num_seqs=8, max_num_batched_tokens=100):
    kv_cache, encoder_cache = KVCacheManager(num_blocks, block_size=4), EncoderCache()
    return Scheduler(kv_cache, encoder_cache, max_num_seqs, max_num_batched_tokens), kv_cache, encoder_cache


def _names(step):
    return [entry.sequence.seq_id for entry in step.scheduled]


def _compute(step):
    """What the engine does with a step: tokens count as computed, complete sequences grow by one."""
    for entry in step.scheduled:
        complete = entry.is_complete
        entry.sequence.num_computed_tokens = entry.stop
        if complete:
            entry.sequence.output_token_ids.append(0)


def _run(scheduler):
    step = scheduler.schedule()
    _compute(step)
    return step


def test_first_come_first_served_within_the_budget():
    scheduler, *_ = _scheduler(max_num_batched_tokens=10)
    for name, length in (("a", 6), ("b", 6), ("c", 2)):
        scheduler.add(_sequence(name, length))
    first = _run(scheduler)
    assert first.is_prefill
    assert [(e.sequence.seq_id, e.num_new_tokens) for e in first.scheduled] == [("a", 6), ("b", 4)]
    second = _run(scheduler)
    assert [(e.sequence.seq_id, e.num_new_tokens) for e in second.scheduled] == [("b", 2), ("c", 2)]
    assert _names(_run(scheduler)) == ["a", "b", "c"]


def test_waiting_prompts_go_before_running_decodes():
    scheduler, *_ = _scheduler()
    scheduler.add(_sequence("a", 3))
    assert _run(scheduler).is_prefill
    assert not _run(scheduler).is_prefill
    scheduler.add(_sequence("b", 3))
    step = _run(scheduler)
    assert step.is_prefill
    assert _names(step) == ["b"]
    step = _run(scheduler)
    assert not step.is_prefill
    assert _names(step) == ["a", "b"]


def test_no_more_than_max_num_seqs():
    scheduler, *_ = _scheduler(max_num_seqs=2)
    sequences = [_sequence(name, 3) for name in "abc"]
    for sequence in sequences:
        scheduler.add(sequence)
    assert _names(_run(scheduler)) == ["a", "b"]
    assert _names(_run(scheduler)) == ["a", "b"]
    scheduler.remove(sequences[0])
    assert _names(_run(scheduler)) == ["c"]


def test_a_prompt_waits_until_its_blocks_are_free():
    scheduler, kv_cache, _ = _scheduler(num_blocks=4)
    first = _sequence("a", 10)
    scheduler.add(first)
    scheduler.add(_sequence("b", 8))
    assert _names(_run(scheduler)) == ["a"]
    assert not _run(scheduler).is_prefill
    scheduler.remove(first)
    assert _names(_run(scheduler)) == ["b"]
    kv_cache.check_integrity()


def test_the_youngest_gives_way_and_comes_back_first():
    scheduler, kv_cache, _ = _scheduler(num_blocks=4)
    old, young = _sequence("old", 7), _sequence("young", 7)
    scheduler.add(old)
    scheduler.add(young)
    scheduler.add(_sequence("later", 2))
    assert _names(_run(scheduler)) == ["old", "young"]  # two full blocks each after the next token
    assert _names(_run(scheduler)) == ["old", "young"]
    step = _run(scheduler)  # the ninth token needs a third block
    assert _names(step) == ["old"]
    assert scheduler.num_preemptions == 1
    assert young.num_computed_tokens == 0
    kv_cache.check_integrity()
    scheduler.remove(old)
    step = _run(scheduler)
    assert _names(step)[0] == "young"
    assert step.scheduled[0].num_new_tokens == 9  # prompt and the two tokens it had drawn


def test_the_youngest_of_three_gives_way():
    scheduler, *_ = _scheduler(num_blocks=6)
    for name in "abc":
        scheduler.add(_sequence(name, 7))
    _run(scheduler)
    _run(scheduler)
    assert _names(_run(scheduler)) == ["a", "b"]


def test_one_sequence_larger_than_the_cache_is_a_broken_promise():
    """max_model_len is bounded by the cache before any request is taken; here that promise is broken."""
    scheduler, *_ = _scheduler(num_blocks=2)
    scheduler.add(_sequence("a", 8))
    _run(scheduler)
    with pytest.raises(IntegrityError, match="a does not fit into the KV cache alone"):
        _run(scheduler)


def test_an_image_is_asked_for_once_per_step_and_not_when_it_is_there():
    scheduler, _, encoder_cache = _scheduler()
    for name in "ab":
        scheduler.add(_sequence(name, 9, "cat", "dog"))
    step = _run(scheduler)
    assert [image.sha256 for image in step.images] == ["cat", "dog"]
    for image in step.images:
        encoder_cache.store(image.sha256, None)
    scheduler.add(_sequence("c", 9, "dog", "bird"))
    assert [image.sha256 for image in _run(scheduler).images] == ["bird"]


def test_removing_gives_everything_back():
    scheduler, kv_cache, encoder_cache = _scheduler()
    sequences = [_sequence(name, 9, "cat") for name in "abc"]
    for sequence in sequences:
        scheduler.add(sequence)
    _run(scheduler)
    for sequence in sequences:
        scheduler.remove(sequence)
    assert not scheduler.has_work
    kv_cache.check_idle()
    encoder_cache.check_idle()
