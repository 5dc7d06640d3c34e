"""float16 in the C++ kernels: every number both ways, every op, on each instruction set."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

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
from wemm.ops.registry import OPS, Inputs
from wemm.ops.rms_norm import rms_norm
from wemm.ops.rope_and_store_kv import rope_and_store_kv
from wemm.ops.silu_and_mul import silu_and_mul

load_kernels("cpu")
BUILT = importlib.util.find_spec("wemm.kernels.cpu._kernels") is not None
pytestmark = pytest.mark.skipif(not BUILT, reason="the C++ extension is not built here")
F16 = torch.float16
ALL_FLOAT16 = torch.arange(-(2**15), 2**15).to(torch.int16).view(F16)
SEEDS = st.integers(0, 2**31)
FUZZ = settings(max_examples=40, deadline=None, derandomize=True)


@pytest.fixture(params=[0, 1, 2, 3], ids=["portable", "AVX2", "AVX-512", "AMX"])
def isa(request):
    """No better than this; a machine that has less runs what it has, and the test says the same again."""
    from wemm.kernels.cpu import _kernels

    _kernels.limit_isa(request.param)
    yield request.param
    _kernels.limit_isa(3)


def _normal(seed, *shapes):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(F16) for shape in shapes]


def _compare(op, arguments, kernel="cpp"):
    dtype = arguments[0].dtype
    tolerance = op.tolerances[dtype]
    wide = [a.float() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments]
    with torch.inference_mode():
        oracle = op.definition(*wide)
        with op.using(kernel):
            got = op(*arguments)
    assert got.dtype is dtype
    torch.testing.assert_close(got.float(), oracle, rtol=tolerance.rtol, atol=tolerance.atol, equal_nan=True)


def _rotated(heads, cos, sin):
    """Queries [n, 1, head_dim] beside a key and a value that nobody asks for."""
    n, _, head_dim = heads.shape
    caches = [torch.empty(1, n, 1, head_dim, dtype=heads.dtype) for _ in range(2)]
    with torch.inference_mode(), rope_and_store_kv.using("cpp"):
        return rope_and_store_kv(
            heads.expand(n, 3, -1).unsqueeze(1).contiguous(), cos, sin, *caches, torch.arange(n)
        )[0]


def _turned(x, cos):
    """x * cos, rounded by the kernel: a head whose second half is zero, turned by an angle without sine."""
    heads = torch.stack((x, torch.zeros_like(x)), 1).reshape(1, 1, -1)
    return _rotated(heads.reshape(len(x), 1, 2), cos.unsqueeze(1), torch.zeros(len(x), 1))[:, 0, 0]


def _in_vectors(x, cos):
    """The same over one wide head: whole vectors instead of ends of rows."""
    heads = torch.cat((x, torch.zeros_like(x))).reshape(1, 1, -1)
    return _rotated(heads, cos.unsqueeze(0), torch.zeros(1, len(x)))[0, 0, : len(x)]


def _assert_same_bits(got, expected):
    """NaN may be any NaN."""
    is_nan = expected.isnan()
    assert torch.equal(got.isnan(), is_nan)
    assert torch.equal(got[~is_nan].view(torch.int16), expected[~is_nan].view(torch.int16))


@pytest.mark.parametrize("kernel", [_turned, _in_vectors])
def test_every_float16_comes_back(isa, kernel):
    got = kernel(ALL_FLOAT16, torch.ones(2**16))
    _assert_same_bits(got, ALL_FLOAT16)


@pytest.mark.parametrize("kernel", [_turned, _in_vectors])
def test_float32_is_rounded_to_the_nearest_even_float16(isa, kernel):
    """Every float16, the middle to its neighbour, what lies right beside that, and numbers of any size."""
    wide = ALL_FLOAT16.float()
    middle = (wide + torch.nextafter(ALL_FLOAT16, ALL_FLOAT16.sign() * torch.inf).float()) / 2
    around = [torch.nextafter(middle, torch.tensor(to)) for to in (-torch.inf, torch.inf)]
    bits = torch.randint(-(2**31), 2**31, (2**17,), generator=torch.Generator().manual_seed(0))
    ends = torch.tensor([65519.996, 65520.0, -65520.0, 3e38, -3e38, 2.0**-25, 2.9802326e-08, 1e-45, -0.0])
    values = torch.cat((wide, middle, *around, bits.to(torch.int32).view(torch.float32), ends))
    _assert_same_bits(kernel(torch.ones(len(values), dtype=F16), values), values.to(F16))


def test_every_float16_as_a_weight(isa):
    """One number per row, at any place of it, among zeros."""
    finite = ALL_FLOAT16[ALL_FLOAT16.isfinite()]
    rows = torch.arange(len(finite))
    weight = torch.zeros(len(finite), 37, dtype=F16)
    weight[rows, rows % 37] = finite
    with torch.inference_mode(), linear.using("cpp"):
        got = linear(torch.ones(2, 37, dtype=F16), weight)
    assert torch.equal(got, finite.expand(2, -1))


@pytest.mark.parametrize("name", [n for n, o in OPS.items() if any(i.name == "cpp" for i in o.implementations)])
def test_parity_in_float16_on_every_instruction_set(isa, name):
    check(OPS[name], "cpp", F16, torch.device("cpu"))


@pytest.mark.parametrize("op", [decode_attention, layer_norm, linear, rms_norm, rope_and_store_kv, silu_and_mul])
def test_float16_has_its_kernel(op):
    cases = op.cases(Inputs(F16, torch.device("cpu"))).values()
    cpp = next(i for i in op.implementations if i.name == "cpp")
    assert any(cpp.supports(*arguments) for arguments in cases)


@FUZZ
@given(
    tokens=st.integers(0, 4), out=st.integers(1, 300), width=st.integers(1, 200), bias=st.booleans(), seed=SEEDS
)
def test_linear_of_any_shape_in_float16(tokens, out, width, bias, seed):
    x, weight, offset = _normal(seed, (tokens, width), (out, width), (out,))
    _compare(linear, (x, (weight * width**-0.5).to(F16), offset if bias else None))


@FUZZ
@given(rows=st.integers(0, 5), width=st.integers(1, 300), seed=SEEDS)
def test_ops_of_rows_of_any_shape_in_float16(rows, width, seed):
    x, up, weight, bias = _normal(seed, (rows, width), (rows, width), (width,), (width,))
    _compare(rms_norm, (x, weight, 1e-5))
    _compare(layer_norm, (x, weight, bias, 1e-6))
    _compare(silu_and_mul, ((x * 20).to(F16), up))


@FUZZ
@given(
    lengths=st.lists(st.integers(1, 200), min_size=1, max_size=3),
    group=st.sampled_from([1, 3, 4]),
    head_dim=st.sampled_from([2, 30, 64, 128]),
    seed=SEEDS,
)
def test_decode_attention_of_any_shape_in_float16(lengths, group, head_dim, seed):
    counts = [-(-length // 16) for length in lengths]
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(seed)).tolist()
    tables = torch.tensor([[order.pop() for _ in range(n)] + [0] * (max(counts) - n) for n in counts]).int()
    cache = (sum(counts), 16, 2, head_dim)
    q, k, v = _normal(seed, (len(lengths), 2 * group, head_dim), cache, cache)
    _compare(decode_attention, (q, k, v, tables, torch.tensor(lengths).int(), head_dim**-0.5))


@pytest.mark.parametrize("wrong", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_shows(isa, wrong):
    """In an input, and as a sum beyond 65504."""
    x, weight = _normal(0, (1, 50), (70, 50))
    x[0, 33] = wrong
    with torch.inference_mode(), linear.using("cpp"):
        assert not linear(x, weight).isfinite().any()
        large = torch.full((1, 50), 200.0, dtype=F16)
        assert linear(large, large).isinf().all()


def test_the_contract_of_linear_in_float16():
    from wemm.kernels.cpu import _kernels
    from wemm.kernels.cpu.tensors import as_argument

    x, weight, out = (as_argument(torch.zeros(shape, dtype=F16)) for shape in ((1, 8), (3, 8), (1, 3)))
    bias = as_argument(torch.zeros(3, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="dtypes differ"):
        _kernels.linear(x, weight, bias, out)
    with pytest.raises(ValueError, match="dtypes differ"):
        _kernels.linear(x, as_argument(torch.zeros(3, 8, dtype=torch.bfloat16)), None, out)


@FUZZ
@given(
    tokens=st.integers(5, 40), out=st.integers(1, 300), width=st.integers(1, 200), bias=st.booleans(), seed=SEEDS
)
def test_linear_of_tokens_that_take_several_passes(tokens, out, width, bias, seed):
    from wemm.kernels.cpu import _kernels
    from wemm.kernels.cpu.tensors import as_argument

    x, weight, offset = _normal(seed, (tokens, width), (out, width), (out,))
    weight = (weight * width**-0.5).to(F16)
    got = torch.empty(tokens, out, dtype=F16)
    bias_argument = as_argument(offset) if bias else None
    _kernels.linear(as_argument(x), as_argument(weight), bias_argument, as_argument(got))
    expected = F.linear(x.float(), weight.float(), offset.float() if bias else None)
    tolerance = linear.tolerances[F16]
    torch.testing.assert_close(got.float(), expected, rtol=tolerance.rtol, atol=tolerance.atol)


@FUZZ
@given(
    tokens=st.integers(0, 40),
    out=st.integers(1, 300),
    width=st.integers(1, 200),
    piece=st.sampled_from([1, 1000, 2**21]),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    seed=SEEDS,
)
def test_widened_linear_of_any_shape_and_size_of_piece(tokens, out, width, piece, bias, dtype, seed):
    import wemm.kernels.cpu.linear as module

    x, weight, offset = (t.to(dtype) for t in _normal(seed, (tokens, width), (out, width), (out,)))
    arguments = x, (weight * width**-0.5).to(dtype), offset if bias else None
    before, module.PIECE = module.PIECE, piece
    try:
        _compare(linear, arguments, f"widened_{str(dtype).removeprefix('torch.')}")
    finally:
        module.PIECE = before


_CHOSEN = """
import torch
from wemm.kernels import load_kernels
from wemm.ops.linear import linear
load_kernels("cpu")
for dtype in (torch.float16, torch.bfloat16):
    for tokens in (4, 64, 65):
        arguments = torch.ones(tokens, 8, dtype=dtype), torch.ones(8, 8, dtype=dtype)
        with torch.inference_mode():
            chosen = linear._choose(*arguments)
        print(next((i.name for i in linear.implementations if i.function is chosen), "definition").split("_")[0])
"""


_OLDER = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
"""oneDNN held to AVX2: what older processors meet."""


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="needs oneDNN, to be told what it has")
def test_where_onednn_has_no_product_of_16_bit_there_is_one():
    result = subprocess.run(
        [sys.executable, "-c", _CHOSEN], env=_OLDER, capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == ["cpp", "cpp", "widened"] * 2


def test_parity_where_onednn_has_no_product_of_16_bit():
    chosen = ["-k", "linear or plora", "-p", "no:cacheprovider", "tests/ops/test_parity.py"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *chosen], env=_OLDER, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout
