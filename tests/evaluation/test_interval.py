"""The interval of a share, and that it is no narrower than it says for scores between 0 and 1."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wemm.errors import ParameterError
from wemm.evaluation.metrics.interval import wilson_interval

totals = st.integers(1, 10**7)
shares = st.floats(0, 1)


def test_a_value_of_the_textbooks():
    """81 of 263 (Newcombe 1998, Table I): 0.2553 to 0.3662."""
    assert wilson_interval(81 / 263, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)


def test_no_question_says_nothing():
    assert wilson_interval(0, 0) == (0, 1)


@given(shares, totals)
def test_the_share_lies_inside_and_the_ends_in_0_to_1(share, total):
    low, high = wilson_interval(share, total)
    assert 0 <= low <= share <= high <= 1
    assert low < high


def test_none_and_all_right_are_ends():
    """Rounding would put the low end of 0 a little above it."""
    assert all(wilson_interval(0, total)[0] == 0 for total in range(1, 3000))
    assert all(wilson_interval(1, total)[1] == 1 for total in range(1, 3000))


@given(shares, totals)
def test_it_mirrors(share, total):
    low, high = wilson_interval(share, total)
    assert wilson_interval(1 - share, total) == pytest.approx((1 - high, 1 - low), abs=1e-9)


@given(st.floats(0, 1), st.integers(1, 10**6))
def test_more_questions_narrow_it(share, total):
    def width(count):
        low, high = wilson_interval(share, count)
        return high - low

    assert width(2 * total) < width(total)


@pytest.mark.parametrize(("share", "total"), [(-0.1, 10), (1.1, 10), (float("nan"), 10), (0.5, -1), (70, 100)])
def test_what_is_no_share_of_questions_is_refused(share, total):
    with pytest.raises(ParameterError, match=r"share in 0\.\.1"):
        wilson_interval(share, total)


@pytest.mark.parametrize("weights", [(8, 1, 1, 1, 9), (1, 1, 1, 1, 1), (5, 5, 0, 0, 0), (1, 0, 0, 2, 17)])
def test_scores_of_vqa_accuracy_fall_inside_at_least_as_often_as_coin_flips(weights):
    """4000 tests of 200 questions each, with scores of 0, 0.3, 0.6, 0.9 and 1."""
    rng = np.random.default_rng(0)
    values, chances = np.array([0, 0.3, 0.6, 0.9, 1]), np.array(weights) / sum(weights)
    truth = float(values @ chances)
    means = rng.choice(values, (4000, 200), p=chances).mean(axis=1)
    flips = rng.binomial(200, truth, 4000) / 200

    def share_inside(found):
        ends = [wilson_interval(min(1.0, float(mean)), 200) for mean in found]
        return np.mean([low <= truth <= high for low, high in ends])

    # Three standard errors of the 4000.
    assert share_inside(means) > 0.95 - 0.01
    assert share_inside(means) > share_inside(flips) - 0.01
