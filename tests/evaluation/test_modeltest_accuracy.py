"""Each quirk of the original's scoring, beside the official score of the same answers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wemm.errors import ParameterError
from wemm.evaluation.metrics.modeltest_accuracy import END_MARKERS, MAX_CHARACTERS, modeltest_accuracy
from wemm.evaluation.metrics.vqa_accuracy import vqa_accuracy


def entries(texts):
    """As the annotations have them: equal answers differ by their number."""
    return [{"answer": text, "answer_confidence": "yes", "answer_id": i} for i, text in enumerate(texts, 1)]


def scores(prediction, texts):
    """(modeltest, official)."""
    return modeltest_accuracy(prediction, entries(texts)), vqa_accuracy(prediction, texts)


@pytest.mark.parametrize(("matches", "score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_without_a_quirk_both_agree(matches, score):
    assert scores("red", ["red"] * matches + ["blue"] * (10 - matches)) == (score, score)


@pytest.mark.parametrize("marker", END_MARKERS)
def test_the_answer_ends_at_an_end_marker(marker):
    assert scores(f"red{marker} and blue", ["red"] * 10) == (1, 0)


def test_the_answer_ends_at_the_first_of_several_end_markers():
    assert scores("red</s>blue<|im_end|>green", ["red"] * 10) == (1, 0)
    assert scores("red###</s>", ["red"] * 10) == (1, 0)


def test_no_answer_counts_as_the_answer_1():
    """It becomes "-1", and the rule for marks takes the minus away."""
    assert scores("", ["1"] * 10) == (1, 0)
    assert scores("", [""] * 10) == (0, 1)
    # A space is an answer, as is one that ends before it begins.
    assert scores(" ", ["1"] * 10) == (0, 0)
    assert scores("</s>", ["1"] * 10) == (0, 0)


@pytest.mark.parametrize("reference", ["Red", "the red", "two", "dont"])
def test_references_keep_capitals_articles_number_words_and_contractions(reference):
    assert scores(reference, [reference] * 9 + ["blue"]) == (0, 1)


def test_references_lose_marks_unless_all_are_one_text():
    assert scores("coca-cola", ["coca-cola"] * 10) == (0, 1)
    assert scores("coca-cola", ["coca-cola"] * 9 + ["pepsi"]) == (1, 1)
    assert scores("5 pm", ["5 p.m."] * 10) == (0, 1)
    assert scores("5 pm", ["5 p.m."] * 9 + ["noon"]) == (1, 1)


@pytest.mark.parametrize("reference", ["red!", "(red", "red - car", " red", "red\n"])
def test_references_keep_the_spaces_that_a_mark_leaves_or_a_typist(reference):
    assert scores(reference, [reference] * 9 + ["blue"]) == (0, 1)


def test_references_that_are_one_text_differ_still_if_their_marks_do():
    """The comparison is made before any rule."""
    assert scores("coca cola", ["coca-cola"] * 9 + ["coca cola"]) == (1, 1)
    assert scores("coca cola", ["coca-cola"] * 10) == (0, 1)


def test_equal_answers_without_a_number_exclude_each_other():
    bare = [{"answer": "red"}] * 10
    assert (modeltest_accuracy("red", bare), vqa_accuracy("red", ["red"] * 10)) == (0, 1)
    half = [{"answer": text} for text in ["red"] * 5 + ["blue"] * 5]
    assert (modeltest_accuracy("red", half), vqa_accuracy("red", ["red"] * 5 + ["blue"] * 5)) == (0.5, 1)


def test_entries_that_become_equal_exclude_each_other():
    """They are compared after the rule for marks: "red." and "red" are one entry then."""
    texts = ["red.", "red", "red.", "red"] + ["blue"] * 6
    assert modeltest_accuracy("red", [{"answer": text} for text in texts]) == 0.6
    assert scores("red", texts) == (1, 1)


def test_commas_and_question_marks_are_marks_like_the_others():
    assert scores("red,blue", ["red blue"] * 10) == (1, 0)
    assert scores("red,blue", ["redblue"] * 10) == (0, 1)
    assert scores("1,000", ["1000"] * 10) == (1, 1)


def test_a_comma_between_digits_removes_marks_of_every_kind():
    assert scores("1,000-2,000", ["10002000"] * 10) == (1, 0)
    assert scores("1,000-2,000", ["1000 2000"] * 10) == (0, 1)


def test_apostrophe_s_stays_with_its_word():
    assert scores("thats", ["that's"] * 10) == (1, 0)
    assert scores("girl's", ["girl 's"] * 10) == (0, 1)


def test_both_remove_32_periods_and_no_more():
    assert scores("x." * 32, ["x" * 32] * 10) == (1, 1)
    assert scores("x." * 33, ["x" * 33] * 10) == (0, 0)
    assert scores("x." * 33, ["x" * 33 + "."] * 10) == (1, 0)


def test_a_prediction_of_more_than_2048_characters_is_refused():
    longest = "x" * MAX_CHARACTERS
    assert scores(longest, [longest] * 10) == (1, 1)
    with pytest.raises(ParameterError, match="at most 2048 characters. Given: 2049") as refusal:
        modeltest_accuracy(longest + "y", entries([longest] * 10))
    assert refusal.value.param == "prediction"
    assert vqa_accuracy(longest + "y", [longest + "y"] * 10) == 1
    # Counted after the cut.
    assert modeltest_accuracy(f" {longest}</s>{longest}", entries([longest] * 10)) == 1


def test_references_of_more_than_2048_characters_are_refused_unless_all_are_one_text():
    long = "x" * (MAX_CHARACTERS + 1)
    assert scores("x", [long] * 10) == (0, 0)
    with pytest.raises(ParameterError, match="at most 2048 characters") as refusal:
        modeltest_accuracy("x", entries([long] * 9 + ["x"]))
    assert refusal.value.param == "answers"


@pytest.mark.parametrize("answers", [[], [{}], [{"answer": 3}], [{"answer": "red"}, {"answer_id": 2}]])
def test_answers_without_a_text_are_refused(answers):
    with pytest.raises(ParameterError, match="entries with a text under") as refusal:
        modeltest_accuracy("red", answers)
    assert refusal.value.param == "answers"


texts = st.lists(st.sampled_from(["red", "Red", "two", "2", "a-b", "a b", "the x", "x.", "x", "1,0", "10"]),
                 min_size=1, max_size=10)  # fmt: skip


@given(st.sampled_from(["red", "two", "a-b", "x", "1,0", ""]), texts, st.booleans())
def test_the_score_is_a_share_and_the_annotations_are_left_alone(prediction, answers, numbered):
    given_entries = entries(answers) if numbered else [{"answer": text} for text in answers]
    before = [dict(entry) for entry in given_entries]
    first = modeltest_accuracy(prediction, given_entries)
    assert 0 <= first <= 1
    assert given_entries == before
    assert modeltest_accuracy(prediction, list(reversed(given_entries))) == first
