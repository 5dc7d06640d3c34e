"""int4 and int8: the way there and back, the error that is left, and the ends of the numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wemm.quantization import INT4_GROUP, SCHEMES, pack_int4, quantize_rows, scheme_of, unpack_int4

INT4, INT8 = SCHEMES["int4"], SCHEMES["int8"]
SEEDS = st.integers(0, 2**31)
FLOATS = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
FUZZ = settings(max_examples=60, deadline=None, derandomize=True)


def _normal(seed, *shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _there_and_back(weight):
    return INT4.dequantize(*INT4.quantize(weight), weight.shape[1])


def _group_errors(weight, back):
    """Sums of squares, float64 [out, groups]."""
    off = torch.nn.functional.pad((weight.double() - back.double()).square(), (0, -weight.shape[1] % INT4_GROUP))
    return off.unflatten(-1, (-1, INT4_GROUP)).sum(-1)


@FUZZ
@given(out=st.integers(1, 9), groups=st.integers(1, 4), seed=SEEDS)
def test_what_is_packed_is_unpacked(out, groups, seed):
    integers = torch.randint(
        -8, 8, (out, groups, INT4_GROUP), generator=torch.Generator().manual_seed(seed)
    ).float()
    assert torch.equal(unpack_int4(pack_int4(integers)), integers)


def test_the_layout_of_a_group():
    """Byte j: element j in its low half, element 64 + j in its high half, each plus 8."""
    integers = torch.zeros(1, 1, INT4_GROUP)
    integers[0, 0, 3], integers[0, 0, 64 + 3], integers[0, 0, 5] = -8, 7, 1
    packed = pack_int4(integers)[0]
    assert packed[3] == 0xF0
    assert packed[5] == 0x89
    assert packed[4] == 0x88


@FUZZ
@given(out=st.integers(1, 9), width=st.integers(1, 700), dtype=FLOATS, seed=SEEDS)
def test_int4_of_any_shape(out, width, dtype, seed):
    weight = _normal(seed, out, width, dtype=dtype)
    packed, scale = INT4.quantize(weight)
    assert (packed.dtype, tuple(packed.shape)) == (INT4.weight_dtype, INT4.weight_shape(out, width))
    assert (scale.dtype, tuple(scale.shape)) == (INT4.scale_dtype, INT4.scale_shape(out, width))
    assert unpack_int4(packed).flatten(-2)[:, width:].eq(0).all(), "filled up with zeros"
    assert (INT4.dequantize(packed, scale, width) - weight.float()).norm() < 0.13 * weight.float().norm()


@FUZZ
@given(width=st.integers(1, 700), spike=st.sampled_from([1.0, 5.0, 40.0]), seed=SEEDS)
def test_no_group_is_worse_than_rounded_to_the_nearest(width, spike, seed):
    weight = _normal(seed, 5, width)
    weight[:, :: INT4_GROUP // 2 + 3] *= spike
    padded = torch.nn.functional.pad(weight, (0, -width % INT4_GROUP)).unflatten(-1, (-1, INT4_GROUP))
    furthest = padded.gather(-1, padded.abs().argmax(-1, keepdim=True))
    scale = (furthest / -8).bfloat16().float()
    plain = ((padded / scale).round().clamp(-8, 7) * scale).flatten(-2)[:, :width]
    ours, theirs = _group_errors(weight, _there_and_back(weight)), _group_errors(weight, plain)
    assert (ours <= theirs * (1 + 1e-5)).all()


@FUZZ
@given(groups=st.integers(1, 4), exponent=st.integers(-30, 30), negative=st.booleans(), seed=SEEDS)
def test_what_int4_can_say_comes_back_as_it_was(groups, exponent, negative, seed):
    """Integers times a power of two, one of them -8."""
    integers = torch.randint(-8, 8, (3, groups, INT4_GROUP), generator=torch.Generator().manual_seed(seed)).float()
    integers[..., 11] = -8
    weight = integers.flatten(-2) * 2.0**exponent * (-1 if negative else 1)
    assert torch.equal(_there_and_back(weight), weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zeros_stay_zeros(dtype):
    weight = torch.zeros(2, 300, dtype=dtype)
    weight[0, :INT4_GROUP] = 1
    back = _there_and_back(weight)
    assert back[0, INT4_GROUP:].eq(0).all()
    assert back[1].eq(0).all()
    assert torch.equal(back[0, :INT4_GROUP], torch.ones(INT4_GROUP))


def test_many_rows_are_the_rows_one_by_one():
    """More than are quantised at a time."""
    weight = _normal(0, 300, 1000)
    packed, scale = INT4.quantize(weight)
    for row in (0, 129, 130, 131, 299):
        one, its_scale = INT4.quantize(weight[row : row + 1])
        assert torch.equal(packed[row], one[0])
        assert torch.equal(scale[row], its_scale[0])


@pytest.mark.parametrize("size", [3e38, 1e30, 1e-20, 1e-30, 1e-36])
def test_huge_and_tiny_weights_are_rounded_like_any_other(size):
    weight = _normal(0, 4, 300)
    weight *= size / weight.abs().max()
    back = _there_and_back(weight)
    assert back.isfinite().all()
    assert (back.double() - weight.double()).norm() < 0.13 * weight.double().norm()


def test_a_power_of_two_changes_only_the_scale():
    weight = _normal(0, 4, 300)
    packed, scale = INT4.quantize(weight)
    for power in (2.0**-60, 2.0**60):
        again, its_scale = INT4.quantize(weight * power)
        assert torch.equal(again, packed)
        assert torch.equal(its_scale, scale * power)


def test_subnormal_float16():
    """The smallest steps of float16, as a group of their own."""
    weight = (torch.randint(-8, 8, (2, 256), generator=torch.Generator().manual_seed(0)) * 2.0**-24).half()
    weight[:, ::128] = -8 * 2.0**-24
    assert torch.equal(_there_and_back(weight), weight.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_makes_its_group_nan(dtype, wrong):
    weight = _normal(0, 3, 300, dtype=dtype)
    good = _there_and_back(weight)
    weight[1, 130] = wrong
    back = _there_and_back(weight)
    hit = torch.zeros(3, 300, dtype=torch.bool)
    hit[1, 128:256] = True
    assert back[hit].isnan().all()
    assert torch.equal(back[~hit], good[~hit])


@pytest.mark.parametrize("shape", [(0, 300), (3, 0)])
def test_nothing_becomes_nothing(shape):
    packed, scale = INT4.quantize(torch.zeros(shape))
    assert tuple(packed.shape) == INT4.weight_shape(*shape)
    assert tuple(scale.shape) == INT4.scale_shape(*shape)
    assert tuple(INT4.dequantize(packed, scale, shape[1]).shape) == shape


@FUZZ
@given(out=st.integers(1, 9), width=st.integers(1, 700), dtype=FLOATS, seed=SEEDS)
def test_int8_is_off_by_half_a_step_at_most(out, width, dtype, seed):
    weight = _normal(seed, out, width, dtype=dtype)
    integers, scale = INT8.quantize(weight)
    assert (integers.dtype, tuple(integers.shape)) == (INT8.weight_dtype, INT8.weight_shape(out, width))
    assert (scale.dtype, tuple(scale.shape)) == (INT8.scale_dtype, INT8.scale_shape(out, width))
    assert integers.abs().amax(-1).eq(127).all()
    off = (INT8.dequantize(integers, scale, width) - weight.float()).abs()
    assert (off <= scale.unsqueeze(-1) * 0.5001).all()


def test_halves_go_to_the_even_neighbour():
    integers, scale = quantize_rows(torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]]))
    assert integers.tolist() == [[127, 0, 2, 2, 0, -2, -2]]
    assert scale.tolist() == [[1.0]]


def test_rows_of_zeros_and_rows_that_are_not_finite():
    integers, scale = quantize_rows(torch.tensor([[0.0, -0.0], [1.0, float("nan")], [float("inf"), 1.0]]))
    assert integers[0].tolist() == [0, 0]
    assert scale[0] == 0
    assert (integers * scale)[1:].isnan().all()


def test_schemes_by_name():
    assert scheme_of(None) is None
    assert scheme_of("int4") is INT4
