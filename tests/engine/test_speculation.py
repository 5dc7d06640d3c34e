"""Drafts: what followed before, more of it where it comes true, none where it does not."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from wemm.engine.speculation import Speculator


def test_what_followed_the_last_three_tokens_is_proposed():
    speculator = Speculator(8)
    assert speculator.propose([1, 2, 3, 4, 5, 6]) == []
    assert speculator.propose([1, 2, 3, 4, 5, 6, 1, 2, 3]) == [4, 5]


def test_the_latest_occurrence_counts():
    assert Speculator(8).propose([1, 2, 3, 4, 4, 1, 2, 3, 7, 7, 1, 2, 3]) == [7, 7]


def test_a_cycle_goes_round():
    speculator = Speculator(8)
    speculator.record(0, 2, 2)
    speculator.record(0, 4, 4)
    assert speculator.propose([9, 1, 2, 1, 2, 1, 2]) == [1, 2] * 4
    assert Speculator(8).propose([5, 5, 5, 5]) == [5, 5]


def test_an_image_is_no_guess():
    assert Speculator(8).propose([1, 2, 3, -200, -200, 1, 2, 3]) == []
    assert Speculator(8).propose([1, 2, 3, 4, -200, 1, 2, 3]) == [4]


def test_guesses_grow_while_they_come_true_and_shrink_when_not():
    speculator, ids = Speculator(8), [*range(20), 0, 1, 2]
    assert len(speculator.propose(ids)) == 2
    for length in (4, 8, 8):
        speculator.record(len(ids), 2, 2)
        assert len(speculator.propose(ids)) == length
    speculator.record(len(ids), 8, 3)
    assert len(speculator.propose(ids)) == 4
    speculator.record(len(ids), 4, 2)
    assert len(speculator.propose(ids)) == 4


def test_after_a_miss_there_is_a_pause_longer_every_time():
    speculator, ids = Speculator(4), [*range(20)]
    pauses = []
    for _ in range(8):
        ids += [0, 1, 2]
        speculator.record(len(ids), 1, 0)
        start = len(ids)
        while not speculator.propose(ids):
            ids += [0, 1, 2] if len(ids) % 3 else [0, 1, 2, 3]
        pauses.append(len(ids) - start)
    assert pauses == sorted(pauses)
    assert 60 <= pauses[-1] <= 70


def test_none_at_all():
    assert Speculator(0).propose([1, 2, 3, 4, 1, 2, 3]) == []


@given(st.lists(st.integers(-1, 2), max_size=40), st.integers(0, 5))
def test_a_guess_is_always_a_continuation_of_the_past(ids, limit):
    """Asked after every token: whatever is proposed stood behind the same three tokens before."""
    speculator = Speculator(limit)
    for length in range(len(ids) + 1):
        past = ids[:length]
        draft = speculator.propose(past)
        assert len(draft) <= limit
        if draft:
            ends = [i for i in range(3, length) if past[i - 3 : i] == past[-3:]]
            assert any((past[i:] * len(draft))[: len(draft)] == draft for i in ends)
