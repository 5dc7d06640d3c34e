"""Blocks: owned once or free, whatever is asked in whatever order."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from wemm.engine.encoder_cache import EncoderCache
from wemm.engine.kv_cache import KVCacheManager
from wemm.errors import IntegrityError


class BlockMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.manager = KVCacheManager(num_blocks=12, block_size=4)
        self.lengths = {}

    @rule(seq_id=st.sampled_from("abcd"), num_tokens=st.integers(1, 30))
    def grow(self, seq_id, num_tokens):
        if self.manager.can_allocate(seq_id, num_tokens):
            self.manager.allocate(seq_id, num_tokens)
            self.lengths[seq_id] = max(num_tokens, self.lengths.get(seq_id, 0))
        else:
            with pytest.raises(IntegrityError):
                self.manager.allocate(seq_id, num_tokens)

    @rule(seq_id=st.sampled_from("abcd"))
    def free(self, seq_id):
        self.manager.free(seq_id)
        self.lengths.pop(seq_id, None)

    @invariant()
    def every_token_has_its_own_slot(self):
        self.manager.check_integrity()
        slots = [self.manager.slot(s, i) for s, length in self.lengths.items() for i in range(length)]
        assert len(set(slots)) == len(slots)
        used = sum(-(-length // 4) for length in self.lengths.values())
        assert self.manager.num_free_blocks == 12 - used


TestBlocks = BlockMachine.TestCase


def test_a_lost_block_is_found():
    manager = KVCacheManager(4, 16)
    manager.allocate("a", 20)
    manager._block_tables["a"].pop()
    with pytest.raises(IntegrityError, match="1 owned and 2 free of 4 blocks"):
        manager.check_integrity()


def test_blocks_left_behind_are_found():
    manager = KVCacheManager(4, 16)
    manager.allocate("a", 1)
    with pytest.raises(IntegrityError, match="still owned by a"):
        manager.check_idle()


def test_an_image_lives_as_long_as_someone_holds_it():
    cache = EncoderCache()
    cache.acquire("one", ["image"])
    cache.acquire("two", ["image"])
    cache.store("image", None)
    cache.release("one")
    assert "image" in cache
    cache.release("two")
    assert "image" not in cache
    cache.check_idle()


def test_images_left_behind_are_found():
    cache = EncoderCache()
    cache.acquire("one", ["image"])
    with pytest.raises(IntegrityError, match="1 images are still held"):
        cache.check_idle()
    cache = EncoderCache()
    cache._embeds["image"] = None
    with pytest.raises(IntegrityError, match="1 images are kept for nobody"):
        cache.check_integrity()


def test_an_image_nobody_holds_is_refused():
    with pytest.raises(IntegrityError, match="held by no sequence"):
        EncoderCache().store("image", None)
