"""Attention over the paged cache in int8 and on matrix tiles: any shape, instruction set and number of threads."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.test_attention import ATTACHED, SEEDS, SHARPNESS, _error, _paged
from tests.kernels.test_attention_on_tiles import _decoding, _run, threads  # noqa: F401 - a fixture
from tests.kernels.test_instruction_sets import _argument, _refused, isa  # noqa: F401 - a fixture
from wemm.kernels.cpu.tensors import DTYPE_CODES
from wemm.ops.decode_attention import decode_attention, with_int8_caches
from wemm.ops.prefill_attention import prefill_attention

BUILT = importlib.util.find_spec("wemm.kernels.cpu._kernels") is not None
pytestmark = pytest.mark.skipif(not BUILT, reason="the C++ extension is not built here")
needs_flash = pytest.mark.skipif(not ATTACHED, reason="needs a CPU with AVX-512 BF16")
FUZZ = settings(max_examples=30, deadline=None, derandomize=True)


@pytest.mark.parametrize("limit", [0, 1, 2, 3], ids=["portable", "AVX2", "AVX-512", "AMX"])
@FUZZ
@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=4),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 9),
    head_dim=st.sampled_from([4, 40, 64, 128]),
    block_size=st.sampled_from([1, 7, 16, 32]),
    dtype=st.sampled_from(list(DTYPE_CODES)),
    int8=st.booleans(),
    sharpness=SHARPNESS,
    seed=SEEDS,
)
def test_decode_attention_over_caches_of_either_kind(
    limit, lengths, kv_heads, group, head_dim, block_size, dtype, int8, sharpness, seed
):
    from wemm.kernels.cpu import _kernels

    arguments = _decoding(lengths, kv_heads, group, head_dim, block_size, sharpness, seed)
    arguments[:3] = (x.to(dtype) for x in arguments[:3])
    _kernels.limit_isa(limit)
    try:
        error, plain = _error(decode_attention, with_int8_caches(tuple(arguments)) if int8 else arguments)
    finally:
        _kernels.limit_isa(3)
    assert error < max(1e-5 if dtype is torch.float32 else 0.004, 2 * plain)


@pytest.mark.parametrize("int8", [False, True], ids=["bfloat16", "int8"])
def test_threads_do_not_change_what_is_decoded(isa, threads, int8):  # noqa: F811
    arguments = tuple(_decoding([700, 1, 130], 2, 4, 128, 16, 1.0, 0))
    arguments = with_int8_caches(arguments) if int8 else arguments
    several = _run(decode_attention, arguments)
    torch.set_num_threads(1)
    assert torch.equal(_run(decode_attention, arguments), several)


@pytest.mark.parametrize("length", [37, 64, 96, 129])
def test_what_lies_behind_the_end_of_an_int8_sequence_is_not_read(isa, length):  # noqa: F811
    arguments = with_int8_caches(tuple(_decoding([length], 2, 4, 64, 16, 1.0, 0)))
    before = _run(decode_attention, arguments)
    for cache in arguments[1:3]:
        cache[arguments[3][0, (length - 1) // 16], (length - 1) % 16 + 1 :] = -1  # the scale becomes NaN
    assert torch.equal(_run(decode_attention, arguments), before)


@pytest.mark.parametrize("place", [1, 2], ids=["key", "value"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_an_int8_cache_could_not_hold_shows(isa, place, value):  # noqa: F811
    arguments = _decoding([300], 1, 4, 64, 16, 1.0, 0)
    arguments[place][arguments[3][0, 200 // 16], 200 % 16, 0, 5] = value
    assert not _run(decode_attention, with_int8_caches(tuple(arguments))).isfinite().any()


@needs_flash
@pytest.mark.parametrize("limit", [2, 3], ids=["AVX-512", "AMX"])
@FUZZ
@given(
    spans=st.lists(st.tuples(st.integers(0, 300), st.integers(1, 150)), min_size=1, max_size=3),
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 4]),
    head_dim=st.sampled_from([8, 68, 128]),
    block_size=st.sampled_from([1, 16, 17]),
    sharpness=SHARPNESS,
    seed=SEEDS,
)
def test_prefill_attention_over_caches_of_int8(
    limit, spans, kv_heads, group, head_dim, block_size, sharpness, seed
):
    from wemm.kernels.cpu import _kernels

    arguments = _paged(spans, kv_heads, group, head_dim, block_size, sharpness, seed)
    _kernels.limit_isa(limit)
    try:
        error, plain = _error(prefill_attention, with_int8_caches(arguments))
    finally:
        _kernels.limit_isa(3)
    assert error < max(0.004, 2 * plain)


def test_contract_of_caches():
    from wemm.kernels.cpu.tensors import as_argument

    query, wide, narrow = _argument(1, 2, 8), _argument(2, 16, 1, 8), _argument(2, 16, 1, 8, dtype=torch.int8)
    fits = _argument(2, 16, 1, 12, dtype=torch.int8)
    kept = torch.tensor([[0]], dtype=torch.int32), torch.tensor([3], dtype=torch.int32)
    where = [as_argument(tensor) for tensor in kept]
    _refused("decode_attention", "as wide as those", query, narrow, narrow, *where, 1.0, query)
    _refused("decode_attention", "value_cache has the wrong dtype", query, wide, fits, *where, 1.0, query)


@needs_flash
def test_contract_of_caches_of_prompts():
    query, wide, narrow = _argument(1, 2, 8), _argument(2, 16, 1, 8), _argument(2, 16, 1, 8, dtype=torch.int8)
    bounds = [0, 1]
    _refused("prefill_attention", "as wide as those", query, narrow, narrow, [[0]], bounds, [3], 1.0, query)
    _refused("prefill_attention", "wrong dtype", query, wide, narrow, [[0]], bounds, [3], 1.0, query)
