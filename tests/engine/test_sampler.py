"""Penalties, filters and draws, each against its definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wemm.engine.sampler import (
    SamplingRow,
    _draw,
    _mix,
    adjust,
    apply_penalties,
    exponential_noise,
    filtered_probs,
    random_key,
    sample,
)
from wemm.errors import ParameterError
from wemm.ops.keep_top_p import keep_top_p
from wemm.request import SamplingParams

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0])


def test_repetition_penalty_counts_prompt_and_answer_but_not_image_positions():
    params = SamplingParams(repetition_penalty=2.0)
    result = apply_penalties(LOGITS, SamplingRow(params, 0, 0, [-200, 0, 3], [3, 1]))
    assert result.tolist() == [1.0, 0.5, 0.0, -2.0, -2.0]


def test_presence_and_frequency_count_the_answer_only():
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    result = apply_penalties(LOGITS, SamplingRow(params, 0, 0, [4, 4, 4], [1, 1, 2]))
    assert result.tolist() == [2.0, 1 - 0.5 - 0.5, -0.75, -1.0, -2.0]


def test_no_penalty_leaves_the_logits_alone():
    assert apply_penalties(LOGITS, SamplingRow(SamplingParams(), 0, 0, [0, 1], [2])) is LOGITS


@pytest.mark.parametrize("last", [0, 1, 4])
def test_a_token_that_only_the_device_knows_counts_like_any_other(last):
    params = SamplingParams(repetition_penalty=1.7, presence_penalty=0.5, frequency_penalty=0.25, min_tokens=3)
    ends = frozenset({2})
    here = SamplingRow(params, 0, 0, [0, 3], [3, 1, last], ends)
    there = SamplingRow(params, 0, 0, [0, 3], [3, 1], ends, pending_token_id=torch.tensor([last]))
    assert here.position == there.position == 3
    assert torch.equal(adjust(LOGITS, here), adjust(LOGITS, there))


def _kept(**options):
    return (filtered_probs(LOGITS[None], [SamplingParams(temperature=1.0, **options)])[0] > 0).tolist()


def test_filters():
    probs = LOGITS.softmax(-1)  # 0.64 0.23 0.09 0.03 0.01
    assert _kept(top_k=2) == [True, True, False, False, False]
    assert _kept(top_k=0) == _kept(top_k=-1) == _kept(top_k=5) == _kept(top_k=99) == [True] * 5
    assert _kept(top_p=0.5) == [True, False, False, False, False]
    assert _kept(top_p=0.7) == [True, True, False, False, False]
    assert _kept(top_p=1e-6) == [True, False, False, False, False]
    assert _kept(min_p=0.2) == [True, True, False, False, False]
    assert _kept(min_p=1.0) == [True, False, False, False, False]
    # top_p works on what top_k left: of 0.64 and 0.23 the first alone is 73 %.
    assert _kept(top_k=2, top_p=0.7) == [True, False, False, False, False]
    assert torch.equal(filtered_probs(LOGITS[None], [SamplingParams(temperature=1.0)])[0], probs)


@settings(max_examples=200, deadline=None)
@given(
    logits=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=30),
    temperature=st.floats(1e-6, 1e4),
    top_p=st.floats(1e-6, 1),
    top_k=st.integers(-1, 40),
    min_p=st.floats(0, 1),
)
def test_a_most_probable_token_always_survives(logits, temperature, top_p, top_k, min_p):
    params = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
    unfiltered = filtered_probs(torch.tensor([logits]), [SamplingParams(temperature=temperature)])
    probs = filtered_probs(torch.tensor([logits]), [params])
    assert probs.isfinite().all()
    assert (probs >= 0).all()
    assert probs.max() == unfiltered.max() > 0


def test_equals_at_the_border_are_all_kept():
    """By top_k and by top_p: which of them comes first decides nothing."""
    logits = torch.tensor([[0.0, 1.0, 0.0]])
    for options in ({"top_k": 2}, {"top_p": 0.7}):
        params = SamplingParams(temperature=1.0, **options)
        assert (filtered_probs(logits, [params])[0] > 0).tolist() == [True, True, True]
    params = SamplingParams(temperature=1.0, top_p=0.5)
    assert (filtered_probs(logits, [params])[0] > 0).tolist() == [False, True, False]


def test_only_rows_with_top_p_look_for_a_nucleus(monkeypatch):
    """Neither greedy nor unrestricted ones, nor those of other filters."""
    given = []

    def keep(probs, top_p):
        given.append((probs.shape, top_p.tolist()))
        return keep_top_p(probs, top_p)

    monkeypatch.setattr("wemm.engine.sampler.keep_top_p", keep)
    without = [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 2, "min_p": 0.1}, {"top_p": 0.5}]

    def rows(options):
        return [SamplingRow(SamplingParams(**o), 0, 0, [], []) for o in options]

    sample(LOGITS.repeat(4, 1), rows(without))
    assert given == []
    half, quarter = ({"temperature": 1.0, "top_p": top_p} for top_p in (0.5, 0.25))
    sample(LOGITS.repeat(6, 1), rows([half, *without, quarter]))
    assert given == [((2, 5), [0.5, 0.25])]


def test_tiny_temperature_is_greedy_and_finite():
    assert filtered_probs(LOGITS[None], [SamplingParams(temperature=1e-6)])[0].tolist() == [1, 0, 0, 0, 0]


@settings(max_examples=50, deadline=None)
@given(
    params=st.lists(
        st.builds(
            SamplingParams,
            temperature=st.floats(0.1, 3),
            top_p=st.floats(0.1, 1),
            top_k=st.integers(0, 12),
            min_p=st.floats(0, 0.5),
        ),
        min_size=1,
        max_size=6,
    ),
    seed=st.integers(0, 2**31),
)
def test_rows_are_filtered_together_as_alone(params, seed):
    logits = torch.randn(len(params), 10, generator=torch.Generator().manual_seed(seed))
    together = filtered_probs(logits, params)
    for i, own in enumerate(params):
        assert torch.equal(together[i], filtered_probs(logits[i : i + 1], [own])[0])


def test_noise_is_exponential_and_belongs_to_its_key():
    """Mean 1, P(x > t) = exp(-t), never 0 or infinite, uncorrelated between keys, the same in any company."""
    keys = [
        random_key(seed, index, position) for seed in (0, 1, 2**64 - 1) for index in (0, 1) for position in (0, 1)
    ]
    assert len(set(keys)) == 12
    noise = exponential_noise(keys, 50_000, torch.device("cpu"))
    assert noise.isfinite().all()
    assert (noise > 0).all()
    for t in (0.1, 1.0, 3.0):
        share = (noise > t).double().mean().item()
        assert share == pytest.approx(math.exp(-t), abs=4 * math.sqrt(math.exp(-t) / noise.numel()))
    correlation = torch.corrcoef(noise) - torch.eye(12)
    assert correlation.abs().max() < 5 / math.sqrt(50_000)
    assert torch.equal(noise[3], exponential_noise([keys[3]], 50_000, torch.device("cpu"))[0])
    assert torch.equal(noise[3, :100], exponential_noise([keys[3]], 100, torch.device("cpu"))[0])


def test_the_generator_is_splitmix64():
    """Against the published algorithm, seeded with 1234567: its first outputs."""
    state, outputs = 1234567, []
    for _ in range(3):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        outputs.append(_mix(state))
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    noise = exponential_noise([1234567], 3, torch.device("cpu"))[0]
    expected = [-math.log(((output >> 41) + 0.5) / 2**23) for output in outputs]
    assert noise.tolist() == pytest.approx(expected, rel=1e-6)


def _choose(logits, **options):
    row = {"params": SamplingParams(), "seed": 0, "index": 0, "prompt_token_ids": [], "output_token_ids": []}
    return sample(torch.tensor([logits]), [SamplingRow(**{**row, **options})]).fetch()[0].token_id


def test_a_bias_is_added_and_can_force_or_forbid():
    assert _choose([2.0, 1.0, 0.0], params=SamplingParams(logit_bias={2: 2.5})) == 2
    assert _choose([2.0, 1.0, 0.0], params=SamplingParams(logit_bias={0: -100})) == 1
    assert _choose([2.0, 1.0, 0.0], params=SamplingParams(logit_bias={2: 100, 0: 50})) == 2


def test_the_end_is_out_of_reach_before_min_tokens():
    params = SamplingParams(min_tokens=2)
    ends = frozenset({0, 1})
    assert _choose([2.0, 1.0, 0.0], params=params, end_token_ids=ends) == 2
    assert _choose([2.0, 1.0, 0.0], params=params, end_token_ids=ends, output_token_ids=[5]) == 2
    assert _choose([2.0, 1.0, 0.0], params=params, end_token_ids=ends, output_token_ids=[5, 5]) == 0


def test_only_what_is_allowed_is_chosen():
    allowed = torch.tensor([False, True, True])
    assert _choose([2.0, 1.0, 0.0], allowed=allowed) == 1
    assert _choose([2.0, 1.0, 0.0], allowed=allowed, params=SamplingParams(logit_bias={0: 100})) == 1


def test_the_logits_given_are_left_alone():
    logits = torch.tensor([[2.0, 1.0, 0.0]] * 2)
    rows = [
        SamplingRow(SamplingParams(logit_bias={2: 5}), 0, 0, [], []),
        SamplingRow(SamplingParams(), 0, 0, [], []),
    ]
    assert [token.token_id for token in sample(logits, rows).fetch()] == [2, 0]
    assert logits.tolist() == [[2.0, 1.0, 0.0]] * 2
    assert sample(logits[:0], []).fetch() == []


def test_nothing_but_the_tokens_is_asked_of_the_device():
    """On a device whose tensors have no values to tell."""
    params = SamplingParams(
        temperature=0.7, top_k=5, top_p=0.9, min_p=0.1, repetition_penalty=1.2, presence_penalty=0.5,
        frequency_penalty=0.5, min_tokens=9, logit_bias={1: 2.0},
    )  # fmt: skip
    allowed, pending = torch.ones(50, dtype=torch.bool), torch.empty(1, dtype=torch.int64, device="meta")
    row = SamplingRow(params, 0, 0, [1, 2, 2], [3, 3], frozenset({4}), allowed, pending)
    logits = torch.empty(2, 50, device="meta")
    adjusted = adjust(logits[0], row)
    assert adjusted is not None
    assert adjusted.shape == (50,)
    assert _draw(logits, [row, row]).shape == (2,)


def test_draws_follow_the_distribution(llm):
    """Of 600 first tokens at temperature 1, each frequent one comes as often as its probability says."""
    prompt = [[1, 8, 463]]
    params = SamplingParams(max_tokens=1, temperature=1.0, n=100, logprobs=3)
    counts: dict[int, int] = {}
    total = 0
    for seed in range(6):
        [output] = llm.generate(prompt, SamplingParams(**{**vars(params), "seed": seed * 1000}))
        for answer in output.outputs:
            total += 1
            counts[answer.token_ids[0]] = counts.get(answer.token_ids[0], 0) + 1
    for token_id, entry in output.outputs[0].logprobs[0].items():
        p = math.exp(entry.logprob)
        if entry.rank <= 3:
            deviation = math.sqrt(total * p * (1 - p))
            assert abs(counts.get(token_id, 0) - total * p) < 4 * deviation


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 0), ("n", 129), ("n", 1.0), ("n", True), ("temperature", -0.1), ("temperature", math.nan),
        ("temperature", math.inf), ("temperature", "1"), ("temperature", 10**400),
        ("temperature", 1e-46), ("top_p", 1e-46), ("repetition_penalty", 1e-40), ("stop_token_ids", [True]),
        ("top_p", 0), ("top_p", 1.1), ("top_k", -2),
        ("top_k", 2**31), ("min_p", -0.1), ("min_p", 2), ("repetition_penalty", 0),
        ("repetition_penalty", math.nan),
        ("presence_penalty", 3), ("frequency_penalty", -2.1), ("max_tokens", 0), ("max_tokens", -1),
        ("max_tokens", 1.5), ("max_tokens", True), ("max_tokens", 2**31), ("seed", -1), ("seed", 2**64),
        ("logprobs", 21), ("logprobs", -1), ("logprobs", True), ("stop", [""]), ("stop", ["x"] * 65),
        ("stop", ["x" * 1025]), ("stop", [1]), ("stop", 3), ("stop_token_ids", ["a"]), ("stop_token_ids", 1.5),
        ("ignore_eos", 1), ("skip_special_tokens", None), ("repetition_guard", 0), ("min_tokens", -1),
        ("min_tokens", 257), ("logit_bias", [1]), ("logit_bias", {1: 101}), ("logit_bias", {1: math.nan}),
        ("logit_bias", {-1: 1}), ("logit_bias", {"1": 1}), ("logit_bias", dict.fromkeys(range(1025), 1)),
    ],
)  # fmt: skip
def test_what_is_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(ParameterError) as error:
        SamplingParams(**{name: value})
    assert name.split("_")[0] in str(error.value)
    assert "\n" not in str(error.value)


def test_accepted_spellings():
    assert SamplingParams(stop="a").stop_strings == ("a",)
    assert SamplingParams(stop=["a", "b"]).stop_strings == ("a", "b")
    assert SamplingParams(stop_token_ids=7).stop_token_ids == (7,)
    assert SamplingParams(temperature=0).greedy
    assert not SamplingParams(temperature=1).greedy
