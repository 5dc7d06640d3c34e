"""The nucleus against its meaning in exact fractions."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from wemm.ops.keep_top_p import keep_top_p

WEIGHTS = st.one_of(st.integers(0, 4).map(float), st.floats(0, 1e6), st.floats(0, 1e-6))
ROWS = st.lists(WEIGHTS, min_size=1, max_size=30).filter(any)
SHARES = st.one_of(st.floats(1e-6, 1), st.sampled_from([1e-6, 0.25, 0.5, 0.75, 1.0]))
FEW_BITS = 2.0**-20
"""Of numbers no smaller, sums and products with a short fraction are exact in float64."""


def _row(weights):
    """Float32 probabilities; small integers among the weights are ties."""
    weights = np.array(weights)
    return (weights / weights.sum()).astype(np.float32)


def _kept(probs, top_p):
    rows = torch.from_numpy(probs)[None]
    [kept] = keep_top_p(rows, torch.tensor([top_p], dtype=torch.float32))
    assert torch.equal(kept, torch.where(kept > 0, rows[0], 0.0)), "kept as they were, or zeroed"
    return kept.numpy()


@settings(max_examples=300, deadline=None)
@given(weights=ROWS, top_p=SHARES)
@example([2.0, 1.0, 1.0], 0.5)
@example([1.0, 0.0, 4.0, 1.0, 2.0], 0.75)
@example([1.0, 1.0, 1.0, 1.0], 0.25)
def test_a_token_is_kept_if_what_is_more_probable_falls_short_of_top_p(weights, top_p):
    probs = _row(weights)
    exact = [Fraction(float(p)) for p in probs]
    wanted = Fraction(float(np.float32(top_p))) * sum(exact)
    before = [sum(other for other in exact if other > p) for p in exact]
    is_exact = all(p == 0 or p >= FEW_BITS for p in probs) and top_p in (0.25, 0.5, 0.75)
    assume(is_exact or all(abs(b - wanted) > 1e-12 for b in before))
    everything = np.float32(top_p) >= 1
    expected = [p if b < wanted or everything else 0.0 for p, b in zip(probs, before, strict=True)]
    assert _kept(probs, top_p).tolist() == expected


@settings(max_examples=100, deadline=None)
@given(weights=ROWS, top_p=SHARES, data=st.data())
def test_the_order_of_the_tokens_does_not_matter(weights, top_p, data):
    probs = _row(weights)
    order = np.array(data.draw(st.permutations(range(len(probs)))))
    assert np.array_equal(_kept(probs[order], top_p), _kept(probs, top_p)[order])


@settings(max_examples=100, deadline=None)
@given(weights=ROWS, shares=st.tuples(SHARES, SHARES))
def test_more_of_top_p_keeps_no_less(weights, shares):
    probs = _row(weights)
    fewer, more = (_kept(probs, top_p) for top_p in sorted(shares))
    assert (more >= fewer).all()
    assert fewer.max() == probs.max()


@pytest.mark.parametrize("vocab_size", [2, 1000, 92_544])
def test_equals_are_kept_together(vocab_size):
    """Flat rows whole, whatever top_p: before none of their tokens is anything more probable."""
    flat = np.full(vocab_size, 1 / vocab_size, dtype=np.float32)
    assert np.array_equal(_kept(flat, 1e-6), flat)
    flat[1] *= 2
    assert np.count_nonzero(_kept(flat, 1e-6)) == 1
    assert np.count_nonzero(_kept(flat, 0.9)) == vocab_size


@pytest.mark.parametrize("scale", [0.01, 1, 4, 20])
def test_rows_of_the_real_vocabulary_match_sums_in_float64(scale):
    generator = np.random.default_rng(0)
    logits = scale * generator.standard_normal(92_544)
    probs = _row(np.exp(logits - logits.max()))
    ordered = np.sort(probs)[::-1].astype(np.float64)
    before = ordered.cumsum() - ordered
    for top_p in (0.1, 0.5, 0.9, 0.999):
        least = ordered[before < np.float32(top_p) * ordered.sum()].min()
        assert np.array_equal(_kept(probs, top_p), np.where(probs >= least, probs, 0))


def test_the_most_probable_survive_a_row_that_other_filters_left_almost_nothing():
    rows = torch.tensor([[0.0, 1e-30, 2e-30], [0.0, 1e-12, 2e-12], [0.0, 0.0, 0.0]])
    kept = keep_top_p(rows, torch.tensor([0.1, 0.1, 0.1]))
    assert kept.amax(dim=1).tolist() == rows.amax(dim=1).tolist()
    assert kept[1].tolist() == [0.0, 0.0, rows[1, 2].item()]
