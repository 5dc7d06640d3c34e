"""Every C++ kernel is the op it stands for, on each instruction set it is compiled for, at any shape."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops.test_parity import check
from wemm.kernels import load_kernels
from wemm.ops.decode_attention import decode_attention
from wemm.ops.layer_norm import layer_norm
from wemm.ops.linear import linear
from wemm.ops.registry import OPS
from wemm.ops.rms_norm import rms_norm
from wemm.ops.rope_and_store_kv import rope_and_store_kv
from wemm.ops.silu_and_mul import silu_and_mul
from wemm.quantization import quantize_kv

load_kernels("cpu")
BUILT = importlib.util.find_spec("wemm.kernels.cpu._kernels") is not None
pytestmark = pytest.mark.skipif(not BUILT, reason="the C++ extension is not built here")
if BUILT:
    from wemm.kernels.cpu.linear import MAX_TOKENS
CPP = [name for name, op in OPS.items() if any(i.name == "cpp" for i in op.implementations)]
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
SEEDS = st.integers(0, 2**31)
TOKENS = st.integers(0, MAX_TOKENS[torch.bfloat16] if BUILT else 0)
FUZZ = settings(max_examples=40, deadline=None, derandomize=True)


@pytest.fixture(params=[0, 1, 2, 3], ids=["portable", "AVX2", "AVX-512", "AMX"])
def isa(request):
    """No better than this; a machine that has less runs what it has, and the test says the same again."""
    from wemm.kernels.cpu import _kernels

    _kernels.limit_isa(request.param)
    yield
    _kernels.limit_isa(3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CPP)
def test_parity_on_every_instruction_set(isa, name, dtype):
    check(OPS[name], "cpp", dtype, torch.device("cpu"))


def test_the_instruction_sets_differ():
    """The limit is obeyed: what multiplies and adds in one step rounds once less, and it shows."""
    from wemm.kernels.cpu import _kernels

    q, k, v = _normal(0, (1, 4, 64), (20, 16, 1, 64), (20, 16, 1, 64), dtype=torch.float32)
    arguments = q, k, v, torch.arange(20).int().unsqueeze(0), torch.tensor([300]).int(), 0.125
    results = []
    with torch.inference_mode(), decode_attention.using("cpp"):
        for limit in (0, 3):
            _kernels.limit_isa(limit)
            results.append(decode_attention(*arguments))
    torch.testing.assert_close(*results)
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert not torch.equal(*results)


def _compare(op, arguments, rtol=None):
    tolerance = op.tolerances[arguments[0].dtype]
    wide = [a.float() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments]
    with torch.inference_mode():
        oracle = op.definition(*wide)
        with op.using("cpp"):
            got = op(*arguments).float()
    torch.testing.assert_close(got, oracle, rtol=rtol or tolerance.rtol, atol=tolerance.atol, equal_nan=True)


def _normal(seed, *shapes, dtype):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def _linear_arguments(tokens, out, width, bias, seed):
    x, weight, offset = _normal(seed, (tokens, width), (out, width), (out,), dtype=torch.bfloat16)
    return x, (weight * width**-0.5).to(torch.bfloat16), offset if bias else None


@FUZZ
@given(tokens=TOKENS, out=st.integers(1, 300), width=st.integers(1, 200), bias=st.booleans(), seed=SEEDS)
def test_linear_of_any_shape(tokens, out, width, bias, seed):
    _compare(linear, _linear_arguments(tokens, out, width, bias, seed))


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("tokens", [5, 16, 17, 32, 33])
@pytest.mark.parametrize(("out", "width"), [(31, 64), (33, 30), (95, 515), (330, 4096)])
def test_linear_where_tiles_end(isa, tokens, out, width, bias):
    """Called as bound: how many tokens the implementation takes depends on the machine."""
    from wemm.kernels.cpu import _kernels
    from wemm.kernels.cpu.tensors import as_argument

    x, weight, offset = _linear_arguments(tokens, out, width, bias, 0)
    got = torch.full((tokens, out), torch.nan, dtype=x.dtype)
    _kernels.linear(as_argument(x), as_argument(weight), as_argument(offset) if bias else None, as_argument(got))
    expected = F.linear(x.float(), weight.float(), offset.float() if bias else None)
    torch.testing.assert_close(got.float(), expected, rtol=2**-8, atol=1e-3)


def test_linear_keeps_what_is_not_finite_in_its_token_and_row(isa):
    from wemm.kernels.cpu import _kernels
    from wemm.kernels.cpu.tensors import as_argument

    x, weight, _ = _linear_arguments(20, 70, 90, False, 0)
    x[3, 89], weight[69, 0] = torch.nan, torch.inf
    got = torch.zeros(20, 70, dtype=x.dtype)
    _kernels.linear(as_argument(x), as_argument(weight), None, as_argument(got))
    expected = torch.ones(20, 70, dtype=torch.bool)
    expected[3], expected[:, 69] = False, False
    assert torch.equal(got.isfinite(), expected)


@FUZZ
@given(
    lengths=st.lists(st.integers(1, 200), min_size=1, max_size=4),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 6),
    head_dim=st.sampled_from([1, 8, 16, 40, 64, 128]),
    block_size=st.sampled_from([1, 7, 16]),
    dtype=DTYPES,
    seed=SEEDS,
)
def test_decode_attention_of_any_shape(lengths, kv_heads, group, head_dim, block_size, dtype, seed):
    counts = [-(-length // block_size) for length in lengths]
    order = torch.randperm(sum(counts) + 1, generator=torch.Generator().manual_seed(seed)).tolist()
    tables = torch.tensor([[order.pop() for _ in range(n)] + [0] * (max(counts) - n) for n in counts]).int()
    cache = (sum(counts) + 1, block_size, kv_heads, head_dim)
    q, k, v = _normal(seed, (len(lengths), kv_heads * group, head_dim), cache, cache, dtype=dtype)
    _compare(decode_attention, (q, k, v, tables, torch.tensor(lengths).int(), head_dim**-0.5))


@FUZZ
@given(
    rows=st.integers(0, 9),
    width=st.integers(1, 300),
    dtype=DTYPES,
    scale=st.sampled_from([1e-3, 1.0, 30.0]),
    seed=SEEDS,
)
def test_norms_of_any_shape(rows, width, dtype, scale, seed):
    x, weight, bias = _normal(seed, (rows, width), (width,), (width,), dtype=dtype)
    x = (x * scale).to(dtype)
    _compare(rms_norm, (x, weight, 1e-5))
    _compare(layer_norm, (x, weight, bias, 1e-6))


@FUZZ
@given(
    tokens=st.integers(0, 5),
    heads=st.integers(1, 4),
    half=st.integers(1, 70),
    dtype=DTYPES,
    int8=st.booleans(),
    seed=SEEDS,
)
def test_rope_and_store_kv_is_the_definition_bit_by_bit(tokens, heads, half, dtype, int8, seed):
    [qkv] = _normal(seed, (tokens, heads, 4, 2 * half), dtype=dtype)
    caches = _normal(seed, *[(3, 4, heads, 2 * half)] * 2, dtype=dtype)
    [angle] = _normal(seed, (tokens, half), dtype=torch.float32)
    caches = [quantize_kv(cache) for cache in caches] if int8 else caches
    slots = torch.randperm(12, generator=torch.Generator().manual_seed(seed))[:tokens]
    results = []
    for name in ("definition", "cpp"):
        with torch.inference_mode(), rope_and_store_kv.using(name):
            copies = [cache.clone() for cache in caches]
            results.append(rope_and_store_kv(qkv, angle.cos(), angle.sin(), *copies, slots))
    assert all(torch.equal(expected, got) for expected, got in zip(*results, strict=True))


@FUZZ
@given(rows=st.integers(0, 5), width=st.integers(1, 5000), dtype=DTYPES, seed=SEEDS)
def test_silu_and_mul_of_any_shape(rows, width, dtype, seed):
    gate, up = _normal(seed, (rows, width), (rows, width), dtype=dtype)
    _compare(silu_and_mul, ((gate * 20).to(dtype), up))


def test_silu_and_mul_at_the_ends_of_the_numbers(isa):
    gate = torch.tensor([[0.0, -0.0, 88.0, -88.0, 200.0, -200.0, 3e38, -3e38, 1e-38, float("inf"), float("nan")]])
    with torch.inference_mode(), silu_and_mul.using("cpp"):
        got = silu_and_mul(gate, torch.ones_like(gate))
    torch.testing.assert_close(got, F.silu(gate), rtol=1e-6, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("place", range(3))
def test_nan_in_attention_stays_nan(isa, place):
    """In the query, the key and the value of the last of many pieces."""
    q, k, v = _normal(0, (1, 4, 16), (20, 16, 1, 16), (20, 16, 1, 16), dtype=torch.float32)
    arguments = [q, k, v, torch.arange(20).int().unsqueeze(0), torch.tensor([300]).int(), 0.25]
    if place == 0:
        q[:] = float("nan")
    else:
        arguments[place][18, 5] = float("nan")
    with torch.inference_mode(), decode_attention.using("cpp"):
        assert decode_attention(*arguments).isnan().all()


def _argument(*shape, dtype=torch.bfloat16):
    from wemm.kernels.cpu.tensors import as_argument

    return as_argument(torch.zeros(shape, dtype=dtype))


@pytest.fixture
def integers():
    """As an argument; contracts read them, so they live as long as the test."""
    from wemm.kernels.cpu.tensors import as_argument

    kept = []

    def make(values, dtype):
        kept.append(torch.tensor(values, dtype=dtype))
        return as_argument(kept[-1])

    return make


def _refused(name, message, *arguments):
    from wemm.kernels.cpu import _kernels

    with pytest.raises(ValueError, match=message):
        getattr(_kernels, name)(*arguments)


def test_contracts_of_rows_and_widths(integers):
    t, wide = _argument, torch.float32
    one, beyond, before, two = (integers(slots, torch.int64) for slots in ([0], [32], [-1], [0, 1]))
    _refused("linear", "bias has 2 in dimension out", t(1, 8), t(3, 8), t(2), t(1, 3))
    _refused("linear", "takes bfloat16", t(1, 8, dtype=wide), t(3, 8, dtype=wide), None, t(1, 3, dtype=wide))
    qkv, angles, cache, query = t(1, 1, 3, 8), t(1, 4, dtype=wide), t(2, 16, 1, 8), t(1, 1, 8)
    _refused("rope_and_store_kv", "cos has the wrong dtype", qkv, t(1, 4), t(1, 4), cache, cache, one, query)
    few = t(1, 3, dtype=wide)
    _refused("rope_and_store_kv", "an angle per pair", qkv, few, few, cache, cache, one, query)
    _refused("rope_and_store_kv", "slots of the cache", qkv, angles, angles, cache, cache, beyond, query)
    _refused("rope_and_store_kv", "slots of the cache", qkv, angles, angles, cache, cache, before, query)
    _refused("rope_and_store_kv", "slot_mapping has 2", qkv, angles, angles, cache, cache, two, query)
    narrow = t(2, 16, 1, 8, dtype=torch.int8)
    _refused("rope_and_store_kv", "as wide as those given", qkv, angles, angles, narrow, narrow, one, query)
    _refused("silu_and_mul", "up has 7", t(1, 8), t(1, 7), t(1, 8))
    _refused("layer_norm", "bias has 7", t(1, 8), t(8), t(7), 1e-6, t(1, 8))


@pytest.mark.parametrize(
    ("tables", "lengths", "message"),
    [
        ([[0]], [17], "every token"),
        ([[2]], [3], "of the cache"),
        ([[-1]], [3], "of the cache"),
        ([[0]], [0], "a token in every"),
        ([[0], [0]], [3, 3], "query has 1 in dimension num_seqs, not 2"),
        ([[0]], [3, 3], "seq_lens has 2"),
    ],
)
def test_contract_of_blocks(tables, lengths, message, integers):
    query, cache = _argument(1, 2, 8), _argument(2, 16, 1, 8)
    where = integers(tables, torch.int32), integers(lengths, torch.int32)
    _refused("decode_attention", message, query, cache, cache, *where, 1.0, query)
