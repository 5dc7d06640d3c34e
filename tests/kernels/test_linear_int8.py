"""linear_int8 in C++: the definition's integers, exact sums on every path, to the last bit; and its contract."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wemm.kernels import load_kernels
from wemm.ops.linear_int8 import linear_int8
from wemm.ops.linear_int8_gelu import linear_int8_gelu
from wemm.quantization import quantize_rows

load_kernels("cpu")
BUILT = importlib.util.find_spec("wemm.kernels.cpu._kernels") is not None
pytestmark = pytest.mark.skipif(not BUILT, reason="the C++ extension is not built here")
BF16 = torch.bfloat16
DTYPES = st.sampled_from([torch.float32, BF16])
SEEDS = st.integers(0, 2**31)
FUZZ = settings(max_examples=40, deadline=None, derandomize=True)
FEW = 8  # tokens, which every machine takes


@pytest.fixture(autouse=True)
def _all_instruction_sets_again():
    from wemm.kernels.cpu import _kernels

    threads = torch.get_num_threads()
    yield
    _kernels.limit_isa(3)
    torch.set_num_threads(threads)


def _inputs(tokens, out, width, dtype, seed):
    """Integers of the whole range, scales of their own per row."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=generator).to(dtype)
    weight = torch.randint(-128, 128, (out, width), dtype=torch.int8, generator=generator)
    scale = torch.rand(out, generator=generator) * width**-0.5 / 128
    return x, weight, scale, torch.randn(out, generator=generator).to(dtype)


def _run(op, arguments, isa=3):
    from wemm.kernels.cpu import _kernels

    _kernels.limit_isa(isa)
    with torch.inference_mode(), op.using("cpp"):
        return op(*arguments)


def _exact(x, weight, scale, bias=None):
    """The op as it is written, with sums that are exact whatever their size."""
    integers, x_scale = quantize_rows(x)
    product = (integers.double() @ weight.double().T).float() * x_scale * scale
    return (product if bias is None else product + bias).to(x.dtype)


def _limits(tokens):
    """The instruction sets that take so many tokens here."""
    from wemm.kernels.cpu import _kernels

    for isa in range(4):
        _kernels.limit_isa(isa)
        if tokens <= FEW or _kernels.has_avx512_vnni():
            yield isa


@FUZZ
@given(
    tokens=st.integers(0, 75),
    out=st.integers(1, 300),
    width=st.integers(1, 300),
    dtype=DTYPES,
    bias=st.booleans(),
    seed=SEEDS,
)
def test_every_instruction_set_has_the_exact_sums_of_any_shape(tokens, out, width, dtype, bias, seed):
    x, weight, scale, offset = _inputs(tokens, out, width, dtype, seed)
    arguments = x, weight, scale, offset if bias else None
    expected = _exact(*arguments)
    for isa in _limits(tokens):
        assert torch.equal(_run(linear_int8, arguments, isa), expected)


@pytest.mark.parametrize(
    ("tokens", "out", "width"),
    [(1, 257, 14336), (8, 130, 4304), (40, 260, 14336), (33, 70, 4608 + 64), (1100, 150, 200), (1057, 40, 9300)],
)
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_sums_over_several_pieces_are_exact(tokens, out, width, dtype):
    """Of inputs, which are packed up to 4608 at a time, and of tokens, which are rounded 1024 at a time."""
    arguments = _inputs(tokens, out, width, dtype, 0)
    expected = _exact(*arguments)
    for isa in _limits(tokens):
        assert torch.equal(_run(linear_int8, arguments, isa), expected)


@pytest.mark.parametrize("isa", [2, 3], ids=["AVX-512", "AMX"])
def test_a_token_does_not_depend_on_the_others_beside_it(isa):
    """One after another, a few and many of them: bit by bit the same, with GELU too."""
    if isa not in _limits(70):
        pytest.skip("needs AVX-512 VNNI")
    x, *rest = _inputs(70, 330, 515, BF16, 0)
    for op in (linear_int8, linear_int8_gelu):
        together = _run(op, (x, *rest), isa)
        for size in (1, 4, 8, 9, 33):
            parts = [_run(op, (part, *rest), isa) for part in x.split(size)]
            assert torch.equal(torch.cat(parts), together)


@pytest.mark.parametrize("tokens", [1, 8, 70, 1100], ids=str)
def test_threads_share_the_work_without_a_trace(tokens):
    arguments = _inputs(tokens, 600, 130, BF16, 0)
    for isa in _limits(tokens):
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(_run(linear_int8, arguments, isa))
        assert torch.equal(results[0], results[1])
        assert torch.equal(results[0], results[2])


@FUZZ
@given(
    tokens=st.integers(1, 12), width=st.integers(1, 200), dtype=DTYPES,
    scale=st.sampled_from([1e-30, 1e-3, 1.0, 1e30]), seed=SEEDS,
)  # fmt: skip
def test_activations_are_rounded_as_the_definition_rounds_them(tokens, width, dtype, scale, seed):
    """The weight passes them on: a row for each input, with 1 in its place."""
    x = (torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)
    integers, x_scale = quantize_rows(x)
    for isa in _limits(tokens):
        got = _run(linear_int8, (x.float(), torch.eye(width, dtype=torch.int8), torch.ones(width)), isa)
        assert torch.equal(got, integers * x_scale)


def test_halves_are_rounded_to_even():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 3.4999998, -126.5]])
    for isa in _limits(1):
        got = _run(linear_int8, (x, torch.eye(8, dtype=torch.int8), torch.ones(8)), isa)
        assert got.tolist() == [[127, 0, 2, 2, 0, -2, 3, -126]]


@FUZZ
@given(tokens=st.integers(1, 75), out=st.integers(1, 200), width=st.integers(1, 200), dtype=DTYPES, seed=SEEDS)
def test_gelu_of_any_shape(tokens, out, width, dtype, seed):
    x, weight, scale, bias = _inputs(tokens, out, width, dtype, seed)
    arguments = x, weight, scale * 10, bias
    tolerance = linear_int8_gelu.tolerances[dtype]
    with torch.inference_mode():
        oracle = linear_int8_gelu.definition(x.float(), weight, scale * 10, bias.float())
    for isa in _limits(tokens):
        got = _run(linear_int8_gelu, arguments, isa).float()
        torch.testing.assert_close(got, oracle, rtol=tolerance.rtol, atol=tolerance.atol)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("tokens", [3, 70])
def test_a_token_with_nan_or_inf_is_nan_and_the_others_are_not(bad, tokens):
    x, *rest = _inputs(tokens, 200, 130, BF16, 0)
    x[1, 7] = bad
    for op in (linear_int8, linear_int8_gelu):
        for isa in _limits(tokens):
            got = _run(op, (x, *rest), isa)
            assert got[1].isnan().all()
            assert got[0].isfinite().all()
            assert got[2:].isfinite().all()


def test_what_is_not_finite_in_scale_or_bias_shows():
    x, weight, scale, bias = _inputs(40, 50, 64, torch.float32, 0)
    scale[3], bias[5] = float("inf"), float("nan")
    for tokens in (1, 40):
        for isa in _limits(tokens):
            got = _run(linear_int8, (x[:tokens], weight, scale, bias), isa)
            assert not got[:, [3, 5]].isfinite().any()
            assert got[:, 6:].isfinite().all()


def test_many_tokens_are_left_to_the_definition_without_vnni():
    from wemm.kernels.cpu import _kernels

    arguments = _inputs(FEW + 1, 20, 30, torch.float32, 0)
    _kernels.limit_isa(1)
    with torch.inference_mode():
        assert linear_int8._choose(*arguments) is linear_int8.definition
        assert linear_int8._choose(arguments[0][:FEW], *arguments[1:]) is not linear_int8.definition


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(weight=torch.zeros(3, 8)), "weight has the wrong dtype"),
        (dict(weight=torch.zeros(3, 8, dtype=torch.uint8)), "weight has the wrong dtype"),
        (dict(weight=torch.zeros(3, 7, dtype=torch.int8)), "weight has 7 in dimension in, not 8"),
        (dict(weight=torch.zeros(8, 3, dtype=torch.int8).T), "weight must have contiguous rows"),
        (dict(scale=torch.zeros(4)), "scale has 4 in dimension out, not 3"),
        (dict(scale=torch.zeros(3, dtype=BF16)), "scale has the wrong dtype"),
        (dict(bias=torch.zeros(2, dtype=BF16)), "bias has 2 in dimension out, not 3"),
        (dict(bias=torch.zeros(3)), "dtypes differ"),
        (dict(out=torch.zeros(2, 4, dtype=BF16)), "out has 4 in dimension out, not 3"),
        (dict(out=torch.zeros(2, 3)), "dtypes differ"),
        (dict(x=torch.zeros(2, 8, dtype=torch.int8)), "x has an unknown dtype"),
    ],
)
@pytest.mark.parametrize("name", ["linear_int8", "linear_int8_gelu"])
def test_cpp_refuses_what_breaks_the_contract(name, change, message):
    from wemm.kernels.cpu import _kernels
    from wemm.kernels.cpu.tensors import as_argument

    tensors = dict(
        x=torch.zeros(2, 8, dtype=BF16), weight=torch.zeros(3, 8, dtype=torch.int8), scale=torch.zeros(3),
        bias=torch.zeros(3, dtype=BF16), out=torch.zeros(2, 3, dtype=BF16),
    )  # fmt: skip
    arguments = {key: as_argument(tensor) for key, tensor in {**tensors, **change}.items()}
    with pytest.raises(ValueError, match=f"{name}: .*{message}"):
        getattr(_kernels, name)(**arguments)


def test_cpp_refuses_many_tokens_without_vnni_and_sums_that_overflow():
    from wemm.kernels.cpu import _kernels
    from wemm.kernels.cpu.tensors import as_argument

    def refused(message, tokens, width):
        x, weight = torch.zeros(tokens, width), torch.zeros(3, width, dtype=torch.int8)
        arguments = (as_argument(t) for t in (x, weight, torch.zeros(3)))
        with pytest.raises(ValueError, match=message):
            _kernels.linear_int8(*arguments, None, as_argument(torch.zeros(tokens, 3)))

    _kernels.limit_isa(1)
    refused("at most 8 tokens without AVX-512 VNNI", FEW + 1, 8)
    refused("at most 131072 inputs", 1, 131073)
