"""Answer text: stop strings across token borders, held-back beginnings, finish reasons."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wemm.checkpoint.checkpoint import BUNDLED_DIRECTORY
from wemm.engine.output import Answer, is_loop
from wemm.processing.tokenizer import Tokenizer
from wemm.request import SamplingParams

TOKENIZER = Tokenizer(BUNDLED_DIRECTORY / "tiny")


def _bytes(text):
    """Ids that spell a text byte by byte: every border is a token border."""
    return [TOKENIZER._model.piece_to_id(f"<0x{b:02X}>") for b in text.encode()]


def _run(token_ids, max_tokens=1000, **params):
    answer = Answer(TOKENIZER, SamplingParams(**params), max_tokens)
    shown = []
    for length in range(1, len(token_ids) + 1):
        answer.push(token_ids[:length])
        shown.append(answer.text)
        if answer.finish_reason:
            break
    return answer, shown


def test_the_end_token_ends_without_text():
    answer, shown = _run([*_bytes("hi"), TOKENIZER.im_end_id, *_bytes("more")])
    assert (answer.text, answer.finish_reason, answer.stop_reason) == ("hi", "stop", None)
    assert len(shown) == 3


def test_ignore_eos_goes_on():
    answer, _ = _run([*_bytes("hi"), TOKENIZER.im_end_id, *_bytes(" there")], ignore_eos=True)
    assert (answer.text, answer.finish_reason) == ("hi there", None)


def test_a_stop_token_is_named():
    answer, _ = _run(_bytes("abc"), stop_token_ids=_bytes("b"))
    assert (answer.text, answer.finish_reason, answer.stop_reason) == ("a", "stop", _bytes("b")[0])


def test_max_tokens_is_length():
    answer, _ = _run(_bytes("abcdef"), max_tokens=3)
    assert (answer.text, answer.finish_reason) == ("abc", "length")


def test_an_answer_that_ends_inside_a_character_says_so():
    answer, shown = _run(_bytes("世"), max_tokens=2)
    assert shown == ["", "��"]
    assert answer.finish_reason == "length"


def test_a_stop_string_across_token_borders():
    answer, shown = _run(_bytes("price: 5 EUR. END of it"), stop=["END"])
    assert (answer.text, answer.finish_reason, answer.stop_reason) == ("price: 5 EUR. ", "stop", "END")
    assert "price: 5 EU" in shown
    assert not {"price: 5 E", "price: 5 EUR. E", "price: 5 EUR. EN"} & set(shown)


def test_the_earliest_stop_string_wins():
    answer, _ = _run(_bytes("abcdef"), stop=["def", "cdef", "x"])
    assert (answer.text, answer.stop_reason) == ("ab", "cdef")


def test_a_stop_string_completed_by_the_last_allowed_token():
    answer, _ = _run(_bytes("ab##"), max_tokens=4, stop=["##"])
    assert (answer.text, answer.finish_reason) == ("ab", "stop")


def test_a_stop_string_in_the_flushed_rest():
    answer, _ = _run(_bytes("世"), max_tokens=2, stop=["�"])
    assert (answer.text, answer.finish_reason) == ("", "stop")


def test_what_was_held_back_is_shown_at_the_end():
    answer, shown = _run(_bytes("ab#"), max_tokens=3, stop=["##"])
    assert shown == ["a", "ab", "ab#"]
    assert answer.finish_reason == "length"


@settings(max_examples=300, deadline=None)
@given(text=st.text("ab世", max_size=14), stops=st.lists(st.text("ab世", min_size=1, max_size=4), max_size=3))
def test_streaming_never_takes_back(text, stops):
    """What is shown only grows, ends as the text before the first stop string, and never passes it."""
    answer, shown = _run(_bytes(text), max_tokens=len(text.encode()) or 1, stop=stops or None)
    hits = [(text.find(s), s) for s in stops if s in text]
    # Stopping happens at the first string to be completed.
    if hits:
        end = min(position + len(s) for position, s in hits)
        start = min(position for position, s in hits if position + len(s) == end)
        expected = text[:start]
    else:
        expected = text
    assert answer.text == expected
    for before, after in pairwise(shown):
        assert after.startswith(before)


@pytest.mark.parametrize("skip", [True, False])
def test_special_tokens_in_text(skip):
    plugin = TOKENIZER.control_ids["<|plugin|>"]
    answer, _ = _run([*_bytes("a"), plugin, *_bytes("b")], skip_special_tokens=skip)
    assert answer.text == ("ab" if skip else "a<|plugin|>b")


def test_nothing_ends_an_answer_before_min_tokens_but_its_own_end():
    """The sampler keeps end tokens out of reach; a stop string that comes too early is text."""
    answer, _ = _run(_bytes("a.b.c"), stop=".", min_tokens=3)
    assert (answer.text, answer.finish_reason) == ("a.b", "stop")


@pytest.mark.parametrize("cycle", [1, 2, 7, 31, 128])
def test_a_loop_is_ended(cycle):
    """Within 32 tokens after the eighth time round, and 256 tokens."""
    beginning, loop = list(range(1000, 1050)), list(range(cycle))
    ids = beginning + loop * 400
    enough = len(beginning) + max(256, 8 * cycle)
    found = next(length for length in range(1, len(ids)) if is_loop(ids[:length]))
    assert enough <= found < enough + 32


def test_a_long_line_of_dots_and_a_table_are_no_loops():
    dots = [5] * 250
    rows = [token for number in range(200) for token in (7, number, 7, 8)]
    for text in (dots, rows, rows + dots):
        assert not any(is_loop(text[:length]) for length in range(len(text) + 1))


def test_a_loop_has_its_own_finish_reason_and_can_be_allowed():
    loop = _bytes("ab") * 300
    answer, shown = _run(loop)
    assert (answer.finish_reason, len(shown)) == ("repetition", 256)
    answer, shown = _run(loop, repetition_guard=False)
    assert (answer.finish_reason, len(shown)) == (None, 600)
