"""The scheduler's order, budgets, sharing and preemption, without a model."""

from __future__ import annotations

import pytest

from wemm.engine.encoder_cache import EncoderCache
from wemm.engine.kv_cache import KVCacheManager
from wemm.engine.scheduler import Limits, Scheduler
from wemm.engine.sequence import Request, Sequence
from wemm.engine.speculation import Speculator
from wemm.errors import IntegrityError
from wemm.processing.image_processor import ImagePlan, ProcessedImage
from wemm.processing.processor import ImageSpan, ProcessedPrompt
from wemm.request import SamplingParams

NUM_LAYERS = 6


class _Answer:
    num_tokens_left = 1000


def _sequence(name, length, *images, priority=0, patches=4, draft=0, first_id=None):
    """`images`: (start, sha256), three tokens each. Different sequences have different tokens."""
    plan = ImagePlan(resized=(28, 28), patch_grid=(1, patches), token_grid=(1, 1))
    spans = tuple(ImageSpan(start, ProcessedImage(None, plan, sha256)) for start, sha256 in images)
    base = hash(name) % 2**40 if first_id is None else first_id
    prompt = ProcessedPrompt(tuple(range(base, base + length)), spans)
    request = Request(name, prompt, SamplingParams(), 0, 0.0, priority)
    return Sequence(name, request, 0, _Answer(), Speculator(draft))


def _scheduler(num_blocks=100, seqs=8, tokens=100, patches=1000, image_patches=1000, capacity=1000):
    kv_cache, encoder_cache = KVCacheManager(num_blocks, block_size=4), EncoderCache(capacity)
    limits = Limits(
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        max_num_batched_patches=patches,
        max_image_patches=image_patches,
        num_vision_layers=NUM_LAYERS,
        embed_bytes_per_token=1,
        embed_bytes_per_call=20,
    )
    return Scheduler(kv_cache, encoder_cache, limits), kv_cache, encoder_cache


def _step(scheduler, encoder_cache=None):
    """Schedule, and do what the engine does; returns {name: new tokens} and the vision slice."""
    plan = scheduler.schedule()
    for image in plan.vision.images if plan.vision and plan.vision.is_complete else ():
        encoder_cache.store(image.sha256, image.plan.num_tokens)
    for entry in plan.scheduled:
        _compute(scheduler, entry)
    return {entry.sequence.seq_id: entry.num_new_tokens for entry in plan.scheduled}, plan.vision


def _compute(scheduler, entry):
    scheduler.advance(entry)
    if entry.is_complete:
        entry.sequence.num_pending_tokens -= 1
        entry.sequence.output_token_ids.append(0)


def _tokens(scheduler):
    return _step(scheduler)[0]


def test_first_come_first_served_within_the_budget():
    scheduler, *_ = _scheduler(tokens=10)
    for name, length in (("a", 6), ("b", 6), ("c", 2)):
        scheduler.add(_sequence(name, length))
    assert _tokens(scheduler) == {"a": 6, "b": 4}
    assert _tokens(scheduler) == {"a": 1, "b": 2, "c": 2}
    assert _tokens(scheduler) == {"a": 1, "b": 1, "c": 1}


def test_decodes_go_on_beside_a_long_prompt():
    """And they come first in the batch."""
    scheduler, *_ = _scheduler(tokens=10)
    scheduler.add(_sequence("short", 3))
    _tokens(scheduler)
    scheduler.add(_sequence("long", 25))
    for expected in ({"short": 1, "long": 9}, {"short": 1, "long": 9}, {"short": 1, "long": 7}):
        assert list(_tokens(scheduler).items()) == list(expected.items())


def test_an_urgent_long_prompt_leaves_a_token_to_everyone_behind_it():
    scheduler, *_ = _scheduler(tokens=10)
    scheduler.add(_sequence("short", 3))
    _tokens(scheduler)
    scheduler.add(_sequence("urgent", 25, priority=-1))
    for expected in ({"short": 1, "urgent": 9}, {"short": 1, "urgent": 9}, {"short": 1, "urgent": 7}):
        assert _tokens(scheduler) == expected


def test_a_budget_smaller_than_the_sequences_starves_nobody():
    scheduler, *_ = _scheduler(tokens=3, seqs=8)
    for name in "abcde":
        scheduler.add(_sequence(name, 2))
    seen = [_tokens(scheduler) for _ in range(4)]
    assert max(sum(step.values()) for step in seen) <= 3
    assert seen[-1] == {"a": 1, "b": 1, "c": 1}  # no more run than have a token each


def test_no_more_than_max_num_seqs():
    scheduler, *_ = _scheduler(seqs=2)
    sequences = [_sequence(name, 3) for name in "abc"]
    for sequence in sequences:
        scheduler.add(sequence)
    assert _tokens(scheduler) == {"a": 3, "b": 3}
    assert _tokens(scheduler) == {"a": 1, "b": 1}
    scheduler.remove(sequences[0])
    assert _tokens(scheduler) == {"b": 1, "c": 3}


def test_a_smaller_priority_goes_first():
    scheduler, *_ = _scheduler(seqs=1)
    first = _sequence("first", 3)
    scheduler.add(first)
    for name, priority in (("late", 5), ("normal", 0), ("urgent", -1), ("normal too", 0)):
        scheduler.add(_sequence(name, 3, priority=priority))
    scheduler.remove(first)
    order = []
    while scheduler.has_work:
        [name] = _tokens(scheduler)
        order.append(name)
        scheduler.remove(scheduler._running[0].sequence)
    assert order == ["urgent", "normal", "normal too", "late"]


def test_nobody_is_passed_over_for_ever():
    """A stream of urgent requests: the one that waits is taken after 64 of them at the latest."""
    scheduler, *_ = _scheduler(seqs=1)
    scheduler.add(_sequence("patient", 3, priority=9))
    taken = []
    for i in range(100):
        scheduler.add(_sequence(f"urgent {i}", 3, priority=0))
        [name] = _tokens(scheduler)
        taken.append(name)
        scheduler.remove(scheduler._running[0].sequence)
    assert taken.index("patient") == 64


def test_a_prompt_waits_until_its_blocks_are_free():
    """Those behind it do not overtake it meanwhile, small as they are."""
    scheduler, kv_cache, _ = _scheduler(num_blocks=4)
    first = _sequence("a", 10)
    scheduler.add(first)
    scheduler.add(_sequence("b", 8))
    scheduler.add(_sequence("c", 1))
    assert _tokens(scheduler) == {"a": 10}
    assert _tokens(scheduler) == {"a": 1}
    scheduler.remove(first)
    assert _tokens(scheduler) == {"b": 8, "c": 1}
    kv_cache.check_integrity()


def test_the_youngest_gives_way_and_comes_back_first():
    scheduler, kv_cache, _ = _scheduler(num_blocks=4)
    old, young = _sequence("old", 7), _sequence("young", 7)
    scheduler.add(old)
    scheduler.add(young)
    scheduler.add(_sequence("later", 2))
    assert _tokens(scheduler) == {"old": 7, "young": 7}  # two full blocks each after the next token
    assert _tokens(scheduler) == {"old": 1, "young": 1}
    assert _tokens(scheduler) == {"old": 1}  # the ninth token needs a third block
    assert scheduler.stats.num_preemptions == 1
    assert young.num_computed_tokens == 0
    kv_cache.check_integrity()
    scheduler.remove(old)
    # Prompt and the two tokens it had drawn; its second block still holds what it held.
    assert _tokens(scheduler) == {"young": 5, "later": 2}


def test_the_last_in_order_gives_way_even_to_those_before_it():
    """The one that needs the block is itself the youngest."""
    scheduler, kv_cache, _ = _scheduler(num_blocks=4)
    old, young = _sequence("old", 5), _sequence("young", 7)
    scheduler.add(old)
    scheduler.add(young)
    assert [_tokens(scheduler) for _ in range(3)][-1] == {"old": 1}
    assert scheduler.stats.num_preemptions == 1
    kv_cache.check_integrity()


def test_the_youngest_of_three_gives_way():
    scheduler, *_ = _scheduler(num_blocks=6)
    for name in "abc":
        scheduler.add(_sequence(name, 7))
    assert [_tokens(scheduler) for _ in range(3)][-1] == {"a": 1, "b": 1}


def test_a_step_with_preemption_takes_nobody_in():
    scheduler, *_ = _scheduler(num_blocks=5)
    for name in "ab":
        scheduler.add(_sequence(name, 7))
    _tokens(scheduler)
    _tokens(scheduler)
    scheduler.add(_sequence("c", 1, priority=-1))
    scheduler._kv_cache._free.popitem()  # as if someone else had it
    assert _tokens(scheduler) == {"a": 1}


def test_one_sequence_larger_than_the_cache_is_a_broken_promise():
    """max_model_len is bounded by the cache before any request is taken; here that promise is broken."""
    scheduler, *_ = _scheduler(num_blocks=2)
    scheduler.add(_sequence("a", 8))
    _tokens(scheduler)
    with pytest.raises(IntegrityError, match="a does not fit into the KV cache alone"):
        scheduler.schedule()


def test_an_equal_prompt_waits_for_the_first_and_shares_it():
    """Twenty questions that arrive together: the common beginning is computed once, chunk by chunk."""
    scheduler, *_ = _scheduler(tokens=12)
    for name in "abc":
        scheduler.add(_sequence(name, 30, first_id=7))
    assert _tokens(scheduler) == {"a": 12}
    assert _tokens(scheduler) == {"a": 12}
    assert _tokens(scheduler) == {"a": 6}
    assert _tokens(scheduler) == {"a": 1, "b": 2, "c": 2}


def test_an_image_is_encoded_before_its_tokens_are_computed():
    scheduler, _, images = _scheduler()
    scheduler.add(_sequence("a", 9, (2, "cat")))
    scheduler.add(_sequence("text", 3))
    tokens, vision = _step(scheduler, images)
    assert tokens == {"text": 3}
    assert [image.sha256 for image in vision.images] == ["cat"]
    tokens, vision = _step(scheduler, images)
    assert tokens == {"text": 1, "a": 9}
    assert vision is None


def test_images_of_several_requests_are_packed_into_one_call():
    scheduler, _, images = _scheduler(image_patches=10)
    for name, picture in (("a", "cat"), ("b", "dog"), ("c", "cat"), ("d", "bird")):
        scheduler.add(_sequence(name, 9, (0, picture)))
    packs = [_step(scheduler, images)[1] for _ in range(3)]
    assert [[image.sha256 for image in pack.images] for pack in packs if pack] == [["cat", "dog"], ["bird"]]
    assert scheduler.stats.num_tower_calls == 2


def test_a_large_image_is_encoded_in_slices_while_others_decode():
    scheduler, _, images = _scheduler(patches=40)
    scheduler.add(_sequence("text", 3))
    _step(scheduler)
    scheduler.add(_sequence("large", 5, (0, "cat"), patches=100))
    slices = []
    while not slices or slices[-1] is not None:
        tokens, vision = _step(scheduler, images)
        slices.append(vision)
        assert tokens["text"] == 1
    assert [(s.first_layer, s.last_layer, s.is_complete) for s in slices[:-1]] == [
        (0, 2, False), (2, 4, False), (4, 6, True),
    ]  # fmt: skip
    assert tokens["large"] == 5


def test_text_between_images_is_computed_while_the_second_is_encoded():
    scheduler, _, images = _scheduler(image_patches=4)
    scheduler.add(_sequence("a", 20, (1, "cat"), (12, "dog")))
    assert _step(scheduler, images)[0] == {}
    assert _step(scheduler, images)[0] == {"a": 12}
    assert _step(scheduler, images)[0] == {"a": 8}


def test_an_image_nobody_waits_for_any_more_is_not_finished():
    scheduler, _, images = _scheduler(patches=1)
    sequence = _sequence("a", 9, (0, "cat"))
    scheduler.add(sequence)
    assert _step(scheduler, images)[1].last_layer == 1
    scheduler.remove(sequence)
    scheduler.add(_sequence("b", 9, (0, "dog")))
    vision = _step(scheduler, images)[1]
    assert (vision.images[0].sha256, vision.first_layer) == ("dog", 0)


def test_an_image_behind_a_shared_prefix_is_not_encoded_again():
    """Its tokens are in the KV cache: the embeddings, long dropped, are not needed."""
    scheduler, _, images = _scheduler(capacity=0)
    first = _sequence("a", 20, (1, "cat"), first_id=0)
    scheduler.add(first)
    _step(scheduler, images)
    _step(scheduler, images)
    assert "cat" not in images
    scheduler.add(_sequence("b", 20, (1, "cat"), first_id=0))
    tokens, vision = _step(scheduler, images)
    assert tokens == {"a": 1, "b": 4}
    assert vision is None


def test_images_ahead_stop_where_room_ends_but_the_first_always_goes():
    scheduler, _, images = _scheduler(capacity=0)  # 20 bytes for a call, three an image
    for i in range(9):
        scheduler.add(_sequence(f"s{i}", 40, (0, f"image {i}")))
    vision = _step(scheduler, images)[1]
    assert len(vision.images) == 6


def test_an_image_larger_than_all_limits_is_encoded_alone():
    scheduler, _, images = _scheduler(capacity=0, image_patches=10)
    plan = ImagePlan(resized=(28, 28), patch_grid=(5, 5), token_grid=(5, 5))  # 27 of 20 bytes, 25 of 10 patches
    sequence = _sequence("a", 30)
    span = ImageSpan(0, ProcessedImage(None, plan, "large"))
    sequence.request = Request("a", ProcessedPrompt(tuple(range(30)), (span,)), SamplingParams(), 0, 0.0)
    scheduler.add(sequence)
    scheduler.add(_sequence("b", 9, (0, "small")))
    assert [[image.sha256 for image in _step(scheduler, images)[1].images] for _ in range(2)] == [
        ["large"],
        ["small"],
    ]


def test_drafts_follow_what_was_seen_before_and_stay_within_limits():
    scheduler, *_ = _scheduler(tokens=8)
    sequence = _sequence("a", 8, draft=4)
    sequence.request = Request("a", ProcessedPrompt((1, 2, 3, 4, 5, 1, 2, 3)), SamplingParams(), 0, 0.0)
    scheduler.add(sequence)
    scheduler.advance(scheduler.schedule().scheduled[0])
    sequence.num_pending_tokens = 0
    sequence.output_token_ids += [4]
    [entry] = scheduler.schedule().scheduled
    assert entry.draft_token_ids == (5, 1)
    assert entry.decides_what_follows
    scheduler.advance(entry)
    sequence.num_pending_tokens = 0
    sequence.output_token_ids += [5, 1, 2]
    scheduler.accept_drafts(entry, num_accepted=2)
    assert sequence.num_computed_tokens == 11
    [entry] = scheduler.schedule().scheduled
    assert entry.draft_token_ids == (3, 4, 5, 1)  # twice as many, as all came true
    sequence.answer = type("Answer", (), {"num_tokens_left": 2})
    assert len(scheduler.schedule().scheduled[0].draft_token_ids) == 1


def test_a_sequence_goes_on_before_its_last_token_is_known():
    """It is given a block for it, and guesses for what follows it if it is the one that was expected."""
    scheduler, kv_cache, _ = _scheduler(tokens=20)
    sequence = _sequence("a", 7, draft=2)
    sequence.request = Request("a", ProcessedPrompt((1, 2, 3, 4, 1, 2, 3)), SamplingParams(), 0, 0.0)
    scheduler.add(sequence)
    scheduler.advance(scheduler.schedule().scheduled[0])
    assert (sequence.num_tokens, sequence.num_known_tokens, sequence.num_computed_tokens) == (8, 7, 7)
    [entry] = scheduler.schedule().scheduled
    assert (entry.start, entry.stop, entry.is_complete) == (7, 8, True)
    assert entry.draft_token_ids == (1, 2)  # 4 is expected at position 7
    assert len(kv_cache.block_table("a")) == 3
    scheduler.advance(entry)
    assert sequence.num_pending_tokens == 2


def test_no_step_is_computed_behind_the_last_token_allowed():
    scheduler, *_ = _scheduler()
    first, second = _sequence("a", 3), _sequence("b", 3)
    first.answer = type("Answer", (), {"num_tokens_left": 2})
    for sequence in (first, second):
        scheduler.add(sequence)
    for expected in (["a", "b"], ["a", "b"], ["b"]):
        scheduled = scheduler.schedule().scheduled
        assert [entry.sequence.seq_id for entry in scheduled] == expected
        for entry in scheduled:
            scheduler.advance(entry)


def test_a_block_is_shared_only_when_all_its_tokens_are_known():
    """One whose last token is on its way has no name yet."""
    scheduler, kv_cache, _ = _scheduler()
    sequence = _sequence("a", 7)
    scheduler.add(sequence)
    for num_known, num_shared in ((7, 1), (8, 1), (9, 2)):
        scheduler.advance(scheduler.schedule().scheduled[0])
        assert sequence.num_known_tokens == num_known
        assert kv_cache._num_published["a"] == num_shared
        sequence.num_pending_tokens -= num_known > 7  # the first answer stays a step behind
        sequence.output_token_ids += [0]


def test_removing_gives_everything_back():
    scheduler, kv_cache, images = _scheduler()
    sequences = [_sequence(name, 9, (0, "cat")) for name in "abc"]
    for sequence in sequences:
        scheduler.add(sequence)
    _step(scheduler, images)
    _step(scheduler, images)
    for sequence in sequences:
        scheduler.remove(sequence)
    assert not scheduler.has_work
    kv_cache.check_idle()
    images.check_idle()
