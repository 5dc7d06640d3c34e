"""Blocks: owned as often as held, or free; shared by equal beginnings; in whatever order they are asked for."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from wemm.engine.encoder_cache import EncoderCache
from wemm.engine.kv_cache import KVCacheManager
from wemm.engine.sequence import Request, Sequence
from wemm.errors import IntegrityError
from wemm.processing.image_processor import ImagePlan, ProcessedImage
from wemm.processing.processor import ImageSpan, ProcessedPrompt
from wemm.request import SamplingParams

SIZE = 4


def _sequence(name, token_ids, images=()):
    """images: (start, token grid, sha256)."""
    spans = tuple(
        ImageSpan(start, ProcessedImage(None, ImagePlan((1, 1), (1, 1), grid), sha256))
        for start, grid, sha256 in images
    )
    prompt = ProcessedPrompt(tuple(token_ids), spans)
    return Sequence(name, Request(name, prompt, SamplingParams(), 0, 0.0), 0, None, None)


def _computed(manager, sequence):
    """Admit a sequence and compute it all; returns the tokens that were shared."""
    shared = manager.admit(sequence)
    sequence.num_computed_tokens = sequence.num_tokens
    manager.publish(sequence)
    return shared


class BlockMachine(RuleBasedStateMachine):
    """Sequences over two token values, so that beginnings are often equal."""

    def __init__(self):
        super().__init__()
        self.manager = KVCacheManager(num_blocks=12, block_size=SIZE)
        self.sequences = {}
        self.count = 0

    @rule(token_ids=st.lists(st.sampled_from([1, 2]), min_size=1, max_size=30))
    def admit(self, token_ids):
        self.count += 1
        sequence = _sequence(f"s{self.count}", token_ids)
        if not self.manager.can_admit(sequence):
            with pytest.raises(IntegrityError):
                self.manager.admit(sequence)
            return
        expected = self.manager.num_cached_tokens(sequence)
        sequence.num_computed_tokens = self.manager.admit(sequence)
        assert sequence.num_computed_tokens == expected < sequence.num_tokens
        self.sequences[sequence.seq_id] = sequence

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), count=st.integers(1, 9))
    def compute(self, data, count):
        sequence = self.sequences[data.draw(st.sampled_from(sorted(self.sequences)))]
        sequence.num_computed_tokens = min(sequence.num_tokens, sequence.num_computed_tokens + count)
        self.manager.publish(sequence)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), token_id=st.sampled_from([1, 2]))
    def grow(self, data, token_id):
        sequence = self.sequences[data.draw(st.sampled_from(sorted(self.sequences)))]
        if self.manager.can_grow(sequence.seq_id, sequence.num_tokens + 1):
            sequence.output_token_ids.append(token_id)
            self.manager.grow(sequence.seq_id, sequence.num_tokens)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), goes_wrong=st.booleans())
    def free(self, data, goes_wrong):
        seq_id = data.draw(st.sampled_from(sorted(self.sequences)))
        if goes_wrong:
            self.manager.unpublish(seq_id)
        self.manager.free(seq_id)
        del self.sequences[seq_id]

    @invariant()
    def a_slot_is_shared_only_for_equal_beginnings(self):
        self.manager.check_integrity()
        held = {}
        for sequence in self.sequences.values():
            slots = self.manager.slots(sequence.seq_id, 0, sequence.num_tokens)
            assert len(set(slots)) == len(slots)
            for position, slot in enumerate(slots.tolist()):
                block_end = (position // SIZE + 1) * SIZE
                beginning = tuple(sequence.tokens(0, min(block_end, sequence.num_tokens)))
                assert held.setdefault(slot, beginning) == beginning
        used = {slot // SIZE for slot in held}
        assert self.manager.num_free_blocks == 12 - len(used)


TestBlocks = BlockMachine.TestCase


def test_an_equal_beginning_is_shared_in_whole_blocks():
    manager = KVCacheManager(16, SIZE)
    assert _computed(manager, _sequence("a", [1, 2, 3, 4, 5, 6, 7, 8, 9])) == 0
    assert _computed(manager, _sequence("b", [1, 2, 3, 4, 5, 6, 7, 8, 0, 0])) == 8
    assert _computed(manager, _sequence("c", [1, 2, 3, 4, 0, 6, 7, 8, 9])) == 4
    assert manager.block_table("a")[:2] == manager.block_table("b")[:2]
    assert manager.block_table("c")[0] == manager.block_table("a")[0]
    assert manager.stats.num_cached_tokens == 12
    # The last token is always computed: its logits are wanted.
    assert _computed(manager, _sequence("d", [1, 2, 3, 4, 5, 6, 7, 8])) == 4


def test_what_is_not_computed_is_not_shared():
    manager = KVCacheManager(16, SIZE)
    first = _sequence("a", range(12))
    manager.admit(first)
    assert manager.num_cached_tokens(_sequence("b", range(12))) == 0
    first.num_computed_tokens = 7
    manager.publish(first)
    assert manager.num_cached_tokens(_sequence("b", range(12))) == 4


def test_the_same_words_about_another_picture_are_not_the_same():
    """Nor about the same pictures in another order."""
    manager = KVCacheManager(64, SIZE)
    ids = [1] + [-200] * 8 + [2] * 5
    cat = (1, (2, 3), "cat")
    _computed(manager, _sequence("a", ids, [cat]))
    assert manager.num_cached_tokens(_sequence("b", ids, [cat])) == 12
    assert manager.num_cached_tokens(_sequence("c", ids, [(1, (2, 3), "dog")])) == 0
    shifted = [1] + [-200] * 16
    _computed(manager, _sequence("d", shifted, [(1, (2, 3), "cat"), (9, (2, 3), "dog")]))
    swapped = _sequence("e", shifted, [(1, (2, 3), "dog"), (9, (2, 3), "cat")])
    assert manager.num_cached_tokens(swapped) == 0


def test_content_outlives_its_owner_until_the_block_is_needed():
    manager = KVCacheManager(4, SIZE)
    _computed(manager, _sequence("a", range(13)))
    manager.free("a")
    assert manager.num_cached_tokens(_sequence("b", range(13))) == 12
    _computed(manager, _sequence("c", [9] * 5))  # takes two blocks: the tail of "a" goes first
    assert manager.num_cached_tokens(_sequence("b", range(13))) == 8
    manager.free("c")
    _computed(manager, _sequence("d", [8] * 13))  # takes all four
    manager.free("d")
    assert manager.num_cached_tokens(_sequence("b", range(13))) == 0
    manager.check_idle()


def test_a_cached_block_that_nobody_owns_is_not_counted_twice():
    """Five blocks, three of them cached and free: six tokens more than they hold do not fit."""
    manager = KVCacheManager(5, SIZE)
    _computed(manager, _sequence("a", range(13)))
    manager.free("a")
    assert manager.can_admit(_sequence("b", range(20)))
    assert not manager.can_admit(_sequence("c", range(21)))


def test_without_prefix_caching_only_one_request_shares_with_itself():
    manager = KVCacheManager(16, SIZE, enable_prefix_caching=False)
    first = _sequence("a", range(9))
    _computed(manager, first)
    assert manager.num_cached_tokens(_sequence("b", range(9))) == 0
    sibling = Sequence("a#1", first.request, 1, None, None)
    assert manager.num_cached_tokens(sibling) == 8


def test_what_went_wrong_is_not_shared():
    manager = KVCacheManager(16, SIZE)
    _computed(manager, _sequence("a", range(9)))
    manager.unpublish("a")
    assert manager.num_cached_tokens(_sequence("b", range(9))) == 0
    manager.free("a")
    manager.check_idle()


def test_a_shared_block_stays_with_the_other_owner():
    manager = KVCacheManager(8, SIZE)
    _computed(manager, _sequence("a", range(9)))
    _computed(manager, _sequence("b", range(9)))
    manager.free("a")
    manager.check_integrity()
    assert manager.num_free_blocks == 5
    manager.free("b")
    manager.check_idle()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda m: m._tables["a"].pop(), "number of owners"),
        (lambda m: m._free.popitem(), "some are lost"),
        (lambda m: m._hash_of_block.popitem(), "hashes and blocks"),
        (lambda m: m._num_published.pop("a"), "published blocks"),
    ],
)
def test_damage_is_found(damage, message):
    manager = KVCacheManager(4, SIZE)
    _computed(manager, _sequence("a", range(9)))
    manager.check_integrity()
    damage(manager)
    with pytest.raises(IntegrityError, match=message):
        manager.check_integrity()


def test_blocks_left_behind_are_found():
    manager = KVCacheManager(4, SIZE)
    manager.admit(_sequence("a", [1]))
    with pytest.raises(IntegrityError, match="still owned by a"):
        manager.check_idle()


def test_no_room_to_grow():
    manager = KVCacheManager(1, SIZE)
    manager.admit(_sequence("a", [1]))
    with pytest.raises(IntegrityError, match="a grows to 5 tokens, but 0 blocks are free"):
        manager.grow("a", 5)


class ImageMachine(RuleBasedStateMachine):
    """Images held, stored and released in any order: what is held stays, the rest is bounded."""

    def __init__(self):
        super().__init__()
        self.cache = EncoderCache(capacity=10)
        self.held = {}
        self.tensors = set()

    @rule(seq_id=st.sampled_from("abc"), images=st.sets(st.sampled_from("uvwxyz")))
    def hold(self, seq_id, images):
        self.cache.hold(seq_id, images)
        self.held.setdefault(seq_id, set()).update(images)

    @rule(seq_id=st.sampled_from("abc"), images=st.none() | st.sets(st.sampled_from("uvwxyz")))
    def release(self, seq_id, images):
        self.cache.release(seq_id, images)
        self.held[seq_id] = set() if images is None else self.held.get(seq_id, set()) - images

    @rule(image=st.sampled_from("uvwxyz"), num_bytes=st.integers(1, 6))
    def store(self, image, num_bytes):
        self.cache.store(image, num_bytes)
        self.tensors.add(image)

    @invariant()
    def tensors_follow(self):
        before = {image for image in self.tensors if image in self.cache}
        self.tensors -= set(self.cache.take_dropped())
        assert self.tensors == before
        self.cache.check_integrity()
        for seq_id, images in self.held.items():
            for image in images:
                assert seq_id in self.cache.holders(image)


TestImages = ImageMachine.TestCase


def test_the_image_unused_for_longest_goes_first():
    cache = EncoderCache(capacity=2)
    for name in "abc":
        cache.hold(name, [name])
        cache.store(name, 1)
    assert cache.num_bytes == 3  # all are held
    cache.release("b")
    assert cache.take_dropped() == ["b"]
    cache.release("a")
    cache.release("c")
    cache.hold("again", ["a"])  # used once more: now "c" is the oldest
    cache.release("again")
    cache.store("d", 1)
    assert cache.take_dropped() == ["c"]
    assert "a" in cache


def test_nothing_is_kept_without_capacity():
    cache = EncoderCache(capacity=0)
    cache.hold("s", ["a", "b"])
    cache.store("a", 1)
    cache.store("b", 1)
    cache.release("s", ["a"])
    assert cache.take_dropped() == ["a"]
    with pytest.raises(IntegrityError, match="1 images are still held"):
        cache.check_idle()
    cache.release("s")
    cache.check_idle()
    assert cache.stats.num_queries == cache.stats.num_encoded == 2
