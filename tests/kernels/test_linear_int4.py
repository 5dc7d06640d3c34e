"""The products with int4 weights: exact sums of integers, any instruction set, shape and number of threads."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wemm.kernels import load_kernels
from wemm.ops.linear_int4 import linear_int4
from wemm.quantization import SCHEMES, pack_int4, quantize_rows

load_kernels("cpu")
BUILT = importlib.util.find_spec("wemm.kernels.cpu._kernels") is not None
pytestmark = pytest.mark.skipif(not BUILT, reason="the C++ extension is not built here")
PORTABLE, AVX2, AVX512, AMX = range(4)
FEW = 4
FUZZ = settings(max_examples=60, deadline=None, derandomize=True)
SEEDS = st.integers(0, 2**31)
SETS = st.sampled_from([PORTABLE, AVX2, AVX512, AMX])


@pytest.fixture(autouse=True)
def _everything_allowed_again():
    from wemm.kernels.cpu import _kernels

    threads = torch.get_num_threads()
    yield
    _kernels.limit_isa(AMX)
    torch.set_num_threads(threads)


def _takes(isa, tokens):
    """From now on no better instructions than these; whether that many tokens have a kernel then."""
    from wemm.kernels.cpu import _kernels

    _kernels.limit_isa(isa)
    return tokens <= FEW or _kernels.has_avx512_vnni()


def _kernel(*arguments):
    with torch.inference_mode(), linear_int4.using("cpp"):
        return linear_int4(*arguments)


def _arguments(tokens, out, width, seed, dtype=torch.float32, bias=False):
    generator = torch.Generator().manual_seed(seed)
    x, weight, offset = (torch.randn(s, generator=generator) for s in ((tokens, width), (out, width), (out,)))
    packed = SCHEMES["int4"].quantize(weight * width**-0.5)
    return x.to(dtype), *packed, offset.to(dtype) if bias else None


def _in_float64(x, weight, scale, bias=None):
    integers, x_scale = quantize_rows(x)
    wide = SCHEMES["int4"].dequantize(weight, scale, x.shape[1]).double()
    product = integers.double() @ wide.T * x_scale.double()
    return product if bias is None else product + bias.double()


@FUZZ
@given(
    tokens=st.one_of(st.integers(0, FEW), st.integers(0, 130)),
    out=st.integers(1, 300),
    width=st.integers(1, 900),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    bias=st.booleans(),
    isa=SETS,
    threads=st.integers(1, 3),
    seed=SEEDS,
)
def test_any_shape(tokens, out, width, dtype, bias, isa, threads, seed):
    tokens = tokens if _takes(isa, tokens) else tokens % (FEW + 1)
    torch.set_num_threads(threads)
    arguments = _arguments(tokens, out, width, seed, dtype, bias)
    tolerance = 4e-6 if dtype is torch.float32 else 2**-8
    expected = _in_float64(*arguments).to(torch.float32)
    torch.testing.assert_close(_kernel(*arguments).float(), expected, rtol=tolerance, atol=tolerance)


@FUZZ
@given(
    tokens=st.integers(1, 70),
    out=st.integers(1, 70),
    groups=st.integers(1, 9),
    ends=st.booleans(),
    isa=SETS,
    seed=SEEDS,
)
def test_sums_of_integers_are_exact(tokens, out, groups, ends, isa, seed):
    """Scales of 1, a largest of 127: nothing is left to round, up to the largest sums there are."""
    tokens = tokens if _takes(isa, tokens) else tokens % FEW + 1
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-127, 128, (tokens, groups * 128), generator=generator)
    integers = torch.randint(-8, 8, (out, groups, 128), generator=generator)
    if ends:
        x, integers = torch.where(x < 0, -127, 127), torch.where(integers < 0, -8, 7)
    x[:, 0] = 127
    scale = torch.ones(out, groups, dtype=torch.bfloat16)
    got = _kernel(x.float(), pack_int4(integers), scale, None)
    assert torch.equal(got, (x @ integers.flatten(1).T).float())


@pytest.mark.parametrize("isa", [AVX512, AMX], ids=["AVX-512", "AMX"])
@pytest.mark.parametrize(
    ("tokens", "out", "width"), [(5, 260, 4096), (17, 333, 14336), (530, 140, 1400), (33, 1000, 14336)]
)
def test_more_tokens_and_rows_than_one_thread_takes_at_once(isa, tokens, out, width):
    if not _takes(isa, tokens):
        pytest.skip("needs AVX-512 VNNI")
    arguments = _arguments(tokens, out, width, 0, bias=True)
    expected = _in_float64(*arguments).to(torch.float32)
    torch.testing.assert_close(_kernel(*arguments), expected, rtol=1e-5, atol=1e-5)


@FUZZ
@given(tokens=st.integers(5, 70), out=st.integers(1, 70), width=st.integers(1, 900), seed=SEEDS)
def test_matrix_tiles_and_vnni_agree_to_the_last_bit(tokens, out, width, seed):
    arguments = _arguments(tokens, out, width, seed)
    if not _takes(AVX512, tokens):
        pytest.skip("needs AVX-512 VNNI")
    plain = _kernel(*arguments)
    assert _takes(AMX, tokens)
    assert torch.equal(_kernel(*arguments), plain)


@pytest.mark.parametrize("isa", [PORTABLE, AVX2, AVX512, AMX], ids=["portable", "AVX2", "AVX-512", "AMX"])
@pytest.mark.parametrize("tokens", [3, 20])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows_in_its_token_alone(isa, tokens, wrong):
    if not _takes(isa, tokens):
        pytest.skip("needs AVX-512 VNNI")
    arguments = _arguments(tokens, 40, 300, 0)
    good = _kernel(*arguments)
    arguments[0][2, 77] = wrong
    got = _kernel(*arguments)
    assert not got[2].isfinite().any()
    others = torch.arange(tokens) != 2
    assert torch.equal(got[others], good[others])


@pytest.mark.parametrize("isa", [PORTABLE, AVX2, AVX512, AMX], ids=["portable", "AVX2", "AVX-512", "AMX"])
@pytest.mark.parametrize("tokens", [3, 20])
def test_a_scale_that_is_not_finite_shows_in_its_row_alone(isa, tokens):
    if not _takes(isa, tokens):
        pytest.skip("needs AVX-512 VNNI")
    x, weight, scale, _ = _arguments(tokens, 40, 300, 0)
    scale[7, 1] = float("inf")
    got = _kernel(x, weight, scale, None)
    assert not got[:, 7].isfinite().any()
    assert got[:, torch.arange(40) != 7].isfinite().all()


@FUZZ
@given(tokens=st.integers(5, 70), seed=SEEDS)
def test_a_token_does_not_depend_on_those_beside_it(tokens, seed):
    if not _takes(AMX, tokens):
        pytest.skip("needs AVX-512 VNNI")
    x, weight, scale, _ = _arguments(tokens, 50, 300, seed)
    assert torch.equal(_kernel(x, weight, scale, None)[-5:], _kernel(x[-5:].contiguous(), weight, scale, None))


def test_many_tokens_without_vnni_are_left_to_the_definition():
    assert not _takes(AVX2, FEW + 1)
    arguments = _arguments(FEW + 1, 40, 300, 0)
    with torch.inference_mode():
        assert torch.equal(linear_int4(*arguments), linear_int4.definition(*arguments))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(weight=torch.zeros(5, 128, dtype=torch.uint8)), "needs 64 bytes per group"),
        (dict(weight=torch.zeros(4, 192, dtype=torch.uint8)), "scale has 5 in dimension out, not 4"),
        (dict(weight=torch.zeros(5, 192, dtype=torch.int8)), "weight has the wrong dtype"),
        (dict(scale=torch.zeros(5, 3)), "scale has the wrong dtype"),
        (dict(scale=torch.zeros(5, 2, dtype=torch.bfloat16)), "needs a scale per 128 inputs"),
        (dict(x=torch.zeros(2, 400)), "needs a scale per 128 inputs"),
        (dict(x=torch.zeros(2, 300, dtype=torch.uint8)), "x has an unknown dtype"),
        (dict(bias=torch.zeros(4)), "bias has 4 in dimension out, not 5"),
        (dict(bias=torch.zeros(5, dtype=torch.bfloat16)), "dtypes differ"),
        (dict(out=torch.zeros(2, 6)), "out has 6 in dimension out, not 5"),
        (dict(out=torch.zeros(5, 2).T), "out must have contiguous rows"),
    ],
)
def test_cpp_refuses_what_breaks_the_contract(change, message):
    from wemm.kernels.cpu import _kernels
    from wemm.kernels.cpu.tensors import as_argument

    x, weight, scale, _ = _arguments(2, 5, 300, 0)
    given = {"x": x, "weight": weight, "scale": scale, "bias": torch.zeros(5), "out": torch.zeros(2, 5), **change}
    with pytest.raises(ValueError, match=message):
        _kernels.linear_int4(**{name: as_argument(tensor) for name, tensor in given.items()})


def test_cpp_refuses_many_tokens_without_vnni():
    from wemm.kernels.cpu import _kernels
    from wemm.kernels.cpu.tensors import as_argument

    assert not _takes(AVX2, FEW + 1)
    x, weight, scale, _ = _arguments(FEW + 1, 5, 300, 0)
    with pytest.raises(ValueError, match="at most 4 tokens without AVX-512 VNNI"):
        _kernels.linear_int4(*map(as_argument, (x, weight, scale)), None, as_argument(torch.zeros(FEW + 1, 5)))
