"""The flash attention kernels: any lengths and head sizes, sharp scores, every mask; and their contract."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wemm.kernels import load_kernels
from wemm.ops.prefill_attention import prefill_attention
from wemm.ops.vision_attention import vision_attention

load_kernels("cpu")
BUILT = importlib.util.find_spec("wemm.kernels.cpu._kernels") is not None
ATTACHED = any(i.name == "cpp" for i in vision_attention.implementations)
pytestmark = pytest.mark.skipif(not ATTACHED, reason="needs a CPU with AVX-512 BF16 and the C++ extension")
BF16 = torch.bfloat16


def _error(op, arguments):
    """|kernel - float32 definition| / |definition|, and the same of the bfloat16 definition."""
    wide = [a.float() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments]
    with torch.inference_mode():
        oracle = op.definition(*wide)
        plain = op.definition(*arguments).float()
        with op.using("cpp"):
            got = op(*arguments).float()
    assert got.isfinite().all()
    return float((got - oracle).norm() / oracle.norm()), float((plain - oracle).norm() / oracle.norm())


def _vision(lengths, heads, head_dim, sharpness, seed):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(sum(lengths), heads, head_dim, generator=generator) for _ in range(3))
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    return (q * sharpness).to(BF16), k.to(BF16), v.to(BF16), bounds, head_dim**-0.5


def _paged(spans, kv_heads, group, head_dim, block_size, sharpness, seed):
    """(tokens before, new tokens) per sequence, blocks in random order."""
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-(before + new) // block_size) for before, new in spans]
    order = torch.randperm(sum(counts) + 1, generator=generator).tolist()
    tables = [[order.pop() for _ in range(n)] + [0] * (max(counts) - n) for n in counts]
    cache = (sum(counts) + 1, block_size, kv_heads, head_dim)
    num_new = sum(new for _, new in spans)
    q = torch.randn(num_new, kv_heads * group, head_dim, generator=generator) * sharpness
    k, v = (torch.randn(*cache, generator=generator) for _ in range(2))
    bounds = torch.tensor([0, *(new for _, new in spans)]).cumsum(0).int()
    lengths = torch.tensor([before + new for before, new in spans]).int()
    tables = torch.tensor(tables).int()
    return q.to(BF16), k.to(BF16), v.to(BF16), tables, bounds, lengths, head_dim**-0.5


SHARPNESS = st.sampled_from([0.0, 1.0, 6.0, 30.0])
SEEDS = st.integers(0, 2**31)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 420), min_size=1, max_size=3),
    heads=st.integers(1, 3),
    head_dim=st.integers(1, 40).map(lambda n: 2 * n),
    sharpness=SHARPNESS,
    seed=SEEDS,
)
def test_vision_attention_of_any_shape(lengths, heads, head_dim, sharpness, seed):
    error, plain = _error(vision_attention, _vision(lengths, heads, head_dim, sharpness, seed))
    assert error < max(0.004, 2 * plain)


@pytest.mark.parametrize("head_dim", [72, 128])
def test_vision_attention_of_the_real_heads_over_many_blocks_of_keys(head_dim):
    error, _ = _error(vision_attention, _vision([1531], 2, head_dim, 1.0, 0))
    assert error < 0.003


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    spans=st.lists(st.tuples(st.integers(0, 300), st.integers(1, 150)), min_size=1, max_size=3),
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 4, 5]),
    head_dim=st.sampled_from([2, 16, 64, 66, 128]),
    block_size=st.sampled_from([1, 16, 17]),
    sharpness=SHARPNESS,
    seed=SEEDS,
)
def test_prefill_attention_of_any_shape(spans, kv_heads, group, head_dim, block_size, sharpness, seed):
    error, plain = _error(prefill_attention, _paged(spans, kv_heads, group, head_dim, block_size, sharpness, seed))
    assert error < max(0.004, 2 * plain)


def test_a_token_does_not_see_the_ones_after_it():
    """To change the last key and value changes the last row alone."""
    arguments = list(_paged([(5, 70)], 1, 2, 64, 16, 1.0, 0))
    with torch.inference_mode(), prefill_attention.using("cpp"):
        before = prefill_attention(*arguments)
        block, offset = arguments[3][0][74 // 16], 74 % 16
        arguments[1], arguments[2] = arguments[1].clone(), arguments[2].clone()
        arguments[1][block, offset], arguments[2][block, offset] = 9.0, 9.0
        after = prefill_attention(*arguments)
    assert torch.equal(before[:-1], after[:-1])
    assert not torch.equal(before[-1], after[-1])


def test_what_lies_in_blocks_of_others_is_not_read():
    arguments = list(_paged([(5, 40)], 1, 2, 64, 16, 1.0, 0))
    unused = (set(range(len(arguments[1]))) - set(arguments[3][0].tolist())).pop()
    with torch.inference_mode(), prefill_attention.using("cpp"):
        before = prefill_attention(*arguments)
        for cache in arguments[1:3]:
            cache[unused] = float("nan")
        assert torch.equal(prefill_attention(*arguments), before)


def test_nan_stays_nan():
    arguments = list(_vision([100], 1, 72, 1.0, 0))
    arguments[1][3] = float("nan")
    with torch.inference_mode(), vision_attention.using("cpp"):
        assert vision_attention(*arguments).isnan().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({3: [0, 5]}, "cu_seqlens must rise from 0 to 10"),
        ({3: [1, 10]}, "cu_seqlens must rise from 0 to 10"),
        ({3: []}, "cu_seqlens must rise from 0 to 10"),
        ({3: [0, 12, 10]}, "cu_seqlens must rise from 0 to 10"),
        ({1: torch.zeros(9, 1, 72, dtype=BF16)}, "key has 9 in dimension num_patches, not 10"),
        ({0: torch.zeros(10, 1, 72)}, "dtypes differ"),
    ],
)
def test_cpp_refuses_what_breaks_the_contract(change, message):
    from wemm.kernels.cpu import _kernels
    from wemm.kernels.cpu.tensors import as_argument

    q, k, v, bounds, scale = _vision([10], 1, 72, 1.0, 0)
    arguments = [q, k, v, bounds.tolist(), scale, torch.empty_like(q)]
    for place, value in change.items():
        arguments[place] = value
    arguments = [as_argument(a) if isinstance(a, torch.Tensor) else a for a in arguments]
    with pytest.raises(ValueError, match=message):
        _kernels.vision_attention(*arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({3: [[0]]}, "blocks for every token"),
        ({3: [[0, 99]]}, "blocks of the cache"),
        ({3: [[0, -1]]}, "blocks of the cache"),
        ({4: [0, 3]}, "cu_seqlens_q must rise from 0 to 10"),
        ({5: [3]}, "at most seq_lens new tokens"),
        ({5: [20, 20]}, "a length per sequence"),
    ],
)
def test_cpp_refuses_blocks_and_lengths_that_are_not_there(change, message):
    from wemm.kernels.cpu import _kernels
    from wemm.kernels.cpu.tensors import as_argument

    q, k, v, tables, bounds, lengths, scale = _paged([(10, 10)], 1, 2, 64, 16, 1.0, 0)
    arguments = [q, k, v, tables.tolist(), bounds.tolist(), lengths.tolist(), scale, torch.empty_like(q)]
    for place, value in change.items():
        arguments[place] = value
    arguments = [as_argument(a) if isinstance(a, torch.Tensor) else a for a in arguments]
    with pytest.raises(ValueError, match=message):
        _kernels.prefill_attention(*arguments)
