"""Attention in bfloat16 by what the processor has: matrix tiles, dot products of pairs, or neither."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.test_attention import ATTACHED, SEEDS, SHARPNESS, _error, _paged, _vision
from tests.kernels.test_instruction_sets import isa  # noqa: F401 - a fixture
from wemm.errors import ParameterError
from wemm.ops.decode_attention import decode_attention
from wemm.ops.prefill_attention import prefill_attention
from wemm.ops.vision_attention import vision_attention

BUILT = importlib.util.find_spec("wemm.kernels.cpu._kernels") is not None
pytestmark = pytest.mark.skipif(not BUILT, reason="the C++ extension is not built here")
needs_flash = pytest.mark.skipif(not ATTACHED, reason="needs a CPU with AVX-512 BF16")
BF16 = torch.bfloat16
FUZZ = settings(max_examples=30, deadline=None, derandomize=True)
FAMILIES = [pytest.param(2, id="AVX-512"), pytest.param(3, id="AMX")]


@pytest.fixture(params=FAMILIES)
def family(request):
    from wemm.kernels.cpu import _kernels

    _kernels.limit_isa(request.param)
    yield
    _kernels.limit_isa(3)


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def _run(op, arguments):
    with torch.inference_mode(), op.using("cpp"):
        return op(*arguments)


@needs_flash
@pytest.mark.parametrize("limit", FAMILIES)
@FUZZ
@given(
    lengths=st.lists(st.integers(1, 700), min_size=1, max_size=4),
    heads=st.integers(1, 3),
    head_dim=st.sampled_from([2, 30, 32, 48, 72, 80, 128, 256]),
    sharpness=SHARPNESS,
    seed=SEEDS,
)
def test_vision_attention_on_either_family(limit, lengths, heads, head_dim, sharpness, seed):
    from wemm.kernels.cpu import _kernels

    _kernels.limit_isa(limit)
    try:
        error, plain = _error(vision_attention, _vision(lengths, heads, head_dim, sharpness, seed))
    finally:
        _kernels.limit_isa(3)
    assert error < max(0.004, 2 * plain)


@needs_flash
@pytest.mark.parametrize("limit", FAMILIES)
@FUZZ
@given(
    spans=st.lists(st.tuples(st.integers(0, 600), st.integers(1, 200)), min_size=1, max_size=3),
    kv_heads=st.integers(1, 2),
    group=st.sampled_from([1, 3, 4]),
    head_dim=st.sampled_from([16, 72, 128]),
    block_size=st.sampled_from([1, 16, 17]),
    sharpness=SHARPNESS,
    seed=SEEDS,
)
def test_prefill_attention_on_either_family(limit, spans, kv_heads, group, head_dim, block_size, sharpness, seed):
    from wemm.kernels.cpu import _kernels

    _kernels.limit_isa(limit)
    arguments = _paged(spans, kv_heads, group, head_dim, block_size, sharpness, seed)
    try:
        error, plain = _error(prefill_attention, arguments)
    finally:
        _kernels.limit_isa(3)
    assert error < max(0.004, 2 * plain)


@needs_flash
def test_threads_do_not_change_the_result(family, threads):
    arguments = _vision([600, 77], 3, 72, 1.0, 0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = _run(vision_attention, arguments)
    torch.set_num_threads(before)
    assert torch.equal(_run(vision_attention, arguments), alone)


@needs_flash
@pytest.mark.parametrize("length", [100, 700])
def test_later_keys_may_exceed_earlier_ones_by_any_amount(family, length):
    """Scores that rise from key to key raise the maximum again and again."""
    q, k, v, bounds, scale = _vision([length], 1, 72, 1.0, 0)
    q[:] = 1.0
    k[:] = (torch.arange(length) * 0.05).to(BF16)[:, None, None]
    error, plain = _error(vision_attention, (q, k, v, bounds, scale))
    assert error < max(0.004, 2 * plain)


@needs_flash
def test_scores_beyond_any_integer_choose_one_key(family):
    q, k, v, bounds, scale = _vision([200], 1, 72, 1.0, 0)
    q[:], k[:] = 1e5, -1e5
    k[137] = 1e5
    assert torch.equal(_run(vision_attention, (q, k, v, bounds, scale)), v[137].expand_as(v))


@needs_flash
def test_equal_scores_are_a_mean(family):
    """A scale of 0 makes them equal."""
    q, k, v, bounds, _ = _vision([300], 2, 72, 1.0, 0)
    error, _ = _error(vision_attention, (q, k, v, bounds, 0.0))
    assert error < 0.004


@needs_flash
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("place", range(3), ids=["query", "key", "value"])
def test_what_is_not_finite_shows(family, place, value):
    """Of a query in its own row, of a key or value in every row that sees it."""
    arguments = _vision([300], 1, 72, 1.0, 0)
    arguments[place][211, 0, 70] = value
    finite = _run(vision_attention, arguments).isfinite().all(-1).flatten()
    if place == 0:
        assert not finite[211]
        assert finite.sum() == 299
    elif value != value or place == 2:
        assert not finite.any()
    else:
        assert not finite.all()


@needs_flash
def test_a_negative_scale_is_left_to_the_definition():
    q, k, v, bounds, scale = _vision([20], 1, 72, 1.0, 0)
    with pytest.raises(ParameterError, match="does not support"):
        _run(vision_attention, (q, k, v, bounds, -scale))


def _decoding(lengths, kv_heads, group, head_dim, block_size, sharpness, seed):
    """Without the bounds of queries: each sequence has one."""
    arguments = _paged([(n - 1, 1) for n in lengths], kv_heads, group, head_dim, block_size, sharpness, seed)
    return [*arguments[:4], *arguments[5:]]


@pytest.mark.parametrize("limit", [0, 1, 2, 3], ids=["portable", "AVX2", "AVX-512", "AMX"])
@FUZZ
@given(
    lengths=st.lists(st.integers(1, 400), min_size=1, max_size=4),
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([4, 8]),
    head_dim=st.sampled_from([32, 96, 128]),
    block_size=st.sampled_from([1, 7, 16]),
    sharpness=SHARPNESS,
    seed=SEEDS,
)
def test_decode_attention_of_groups_of_four(
    limit, lengths, kv_heads, group, head_dim, block_size, sharpness, seed
):
    from wemm.kernels.cpu import _kernels

    _kernels.limit_isa(limit)
    try:
        error, plain = _error(
            decode_attention, _decoding(lengths, kv_heads, group, head_dim, block_size, sharpness, seed)
        )
    finally:
        _kernels.limit_isa(3)
    assert error < max(0.004, 2 * plain)


@pytest.mark.parametrize("place", range(3), ids=["query", "key", "value"])
def test_nan_shows_while_decoding(isa, place):  # noqa: F811
    arguments = _decoding([300], 1, 4, 64, 16, 1.0, 0)
    if place == 0:
        arguments[0][:] = float("nan")
    else:
        arguments[place][arguments[3][0, 200 // 16], 200 % 16] = float("nan")
    assert _run(decode_attention, arguments).isnan().all()


def test_what_lies_behind_the_end_is_not_read_while_decoding(isa):  # noqa: F811
    arguments = _decoding([37], 2, 4, 64, 16, 1.0, 0)
    before = _run(decode_attention, arguments)
    for cache in arguments[1:3]:
        cache[arguments[3][0, 2], 37 % 16 :] = float("nan")
    assert torch.equal(_run(decode_attention, arguments), before)


@needs_flash
def test_contract_of_the_scale():
    from wemm.kernels.cpu import _kernels
    from wemm.kernels.cpu.tensors import as_argument

    x = as_argument(torch.zeros(3, 1, 8, dtype=BF16))
    with pytest.raises(ValueError, match="no negative scale"):
        _kernels.vision_attention(x, x, x, [0, 3], -1.0, x)


@needs_flash
def test_contract_of_the_instruction_set():
    from wemm.kernels.cpu import _kernels
    from wemm.kernels.cpu.tensors import as_argument

    x = as_argument(torch.zeros(3, 1, 8, dtype=BF16))
    _kernels.limit_isa(1)
    try:
        with pytest.raises(ValueError, match="needs AVX-512 with BF16"):
            _kernels.vision_attention(x, x, x, [0, 3], 1.0, x)
    finally:
        _kernels.limit_isa(3)
