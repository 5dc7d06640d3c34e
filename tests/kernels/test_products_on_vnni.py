"""Many tokens times quantised weights on AVX-512 VNNI: wherever blocks end, the bits are those of matrix tiles."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wemm.kernels import load_kernels
from wemm.ops.linear_int4 import linear_int4
from wemm.ops.linear_int8 import linear_int8
from wemm.quantization import SCHEMES, quantize_rows

load_kernels("cpu")
BUILT = importlib.util.find_spec("wemm.kernels.cpu._kernels") is not None
pytestmark = pytest.mark.skipif(not BUILT, reason="the C++ extension is not built here")
OPS = {"int8": linear_int8, "int4": linear_int4}
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
AVX512, AMX = 2, 3


@pytest.fixture(autouse=True)
def _needs_vnni():
    from wemm.kernels.cpu import _kernels

    threads = torch.get_num_threads()
    _kernels.limit_isa(AVX512)
    if not _kernels.has_avx512_vnni():
        pytest.skip("needs AVX-512 VNNI")
    yield
    _kernels.limit_isa(AMX)
    torch.set_num_threads(threads)


def _arguments(scheme, tokens, out, width, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias = (torch.randn(s, generator=generator) for s in ((tokens, width), (out, width), (out,)))
    return x.to(dtype), *SCHEMES[scheme].quantize(weight * width**-0.5), bias.to(dtype)


def _run(scheme, arguments, isa=AVX512, threads=1):
    from wemm.kernels.cpu import _kernels

    _kernels.limit_isa(isa)
    torch.set_num_threads(threads)
    with torch.inference_mode(), OPS[scheme].using("cpp"):
        return OPS[scheme](*arguments)


@pytest.mark.parametrize("scheme", OPS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    tokens=st.integers(9, 140), out=st.integers(1, 300), width=st.integers(1, 1200), dtype=DTYPES,
    threads=st.integers(1, 3), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_any_shape_has_the_bits_of_matrix_tiles(scheme, tokens, out, width, dtype, threads, seed):
    """On a machine without tiles, both run the same."""
    arguments = _arguments(scheme, tokens, out, width, dtype, seed)
    assert torch.equal(_run(scheme, arguments, AVX512, threads), _run(scheme, arguments, AMX))


@pytest.mark.parametrize("scheme", OPS)
@pytest.mark.parametrize("tokens", [63, 64, 65, 1024, 1033])
@pytest.mark.parametrize(("out", "width"), [(47, 2049), (49, 4096), (241, 600)])
def test_sums_go_on_where_blocks_end(scheme, tokens, out, width):
    """64 tokens at a time, 1024 rounded at once, 48 outputs, 240 packed at once, 2048 of their inputs."""
    arguments = _arguments(scheme, tokens, out, width)
    x, weight, scale, bias = arguments
    integers, x_scale = quantize_rows(x)
    product = integers.double() @ SCHEMES[scheme].dequantize(weight, scale, width).double().T * x_scale + bias
    torch.testing.assert_close(_run(scheme, arguments), product.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheme", OPS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_in_its_token_alone(scheme, bad):
    arguments = _arguments(scheme, 70, 100, 700)
    arguments[0][9, 650] = bad
    finite = _run(scheme, arguments).isfinite()
    assert not finite[9].any()
    assert finite[torch.arange(70) != 9].all()
