"""GPTQ's arithmetic: outputs kept better than by rounding, and equal to rounding where nothing can be gained."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wemm.calibration.gptq import gptq
from wemm.quantization import SCHEMES

INT4 = SCHEMES["int4"]
SEEDS = st.integers(0, 2**31)
FUZZ = settings(max_examples=20, deadline=None, derandomize=True)


def _weight(seed, out=24, width=300):
    return torch.randn(out, width, generator=torch.Generator().manual_seed(seed)) * width**-0.5


def _inputs(seed, width=300, rows=500):
    """Correlated: most of what varies lies in few directions."""
    generator, few = torch.Generator().manual_seed(seed + 1), max(2, width // 8)
    mixed = torch.randn(rows, few, generator=generator) @ torch.randn(few, width, generator=generator)
    return mixed + torch.randn(rows, width, generator=generator)


def _output_error(weight, x, stored):
    return float((x @ (weight - INT4.dequantize(*stored, weight.shape[1])).T).norm() / (x @ weight.T).norm())


def _same(a, b):
    return torch.equal(a[0], b[0]) and torch.equal(a[1].nan_to_num(7), b[1].nan_to_num(7))


@FUZZ
@given(width=st.sampled_from([24, 128, 300, 512]), seed=SEEDS)
def test_outputs_are_kept_better_than_by_rounding(width, seed):
    weight, x = _weight(seed, width=width), _inputs(seed, width)
    calibrated = gptq(weight, x.T @ x)
    assert tuple(calibrated[0].shape) == INT4.weight_shape(24, width)
    assert (calibrated[0].dtype, calibrated[1].dtype) == (INT4.weight_dtype, INT4.scale_dtype)
    assert _output_error(weight, x, calibrated) < 0.85 * _output_error(weight, x, INT4.quantize(weight))


@FUZZ
@given(width=st.integers(1, 400), size=st.sampled_from([1e-6, 1.0, 300.0]), seed=SEEDS)
def test_independent_inputs_leave_it_at_rounding(width, size, seed):
    """Bit for bit."""
    weight = _weight(seed, width=width)
    assert _same(gptq(weight, torch.eye(width) * size), INT4.quantize(weight))


@pytest.mark.parametrize("block", [1, 32, 128])
def test_columns_are_updated_at_once_or_one_by_one(block):
    """Sums in another order: a weight between two integers may fall either way, the outputs are as good."""
    weight, x = _weight(0), _inputs(0)
    usual, other = gptq(weight, x.T @ x), gptq(weight, x.T @ x, block=block)
    assert (usual[0] != other[0]).float().mean() < 0.02
    assert _output_error(weight, x, other) == pytest.approx(_output_error(weight, x, usual), rel=0.02)


def test_the_same_again():
    weight, x = _weight(3), _inputs(3)
    assert _same(gptq(weight, x.T @ x), gptq(weight, x.T @ x))


def test_the_hessian_and_the_weight_are_left_alone():
    weight, x = _weight(4), _inputs(4)
    hessian = x.T @ x
    before = weight.clone(), hessian.clone()
    gptq(weight, hessian)
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])


def test_inputs_that_are_always_zero_are_rounded_and_take_nothing_over():
    weight, x = _weight(5), _inputs(5)
    dead = [0, 7, 131, 299]
    x[:, dead] = 0
    calibrated = gptq(weight, x.T @ x)
    assert _output_error(weight, x, calibrated) < 0.85 * _output_error(weight, x, INT4.quantize(weight))
    back = INT4.dequantize(*calibrated, 300)
    step = calibrated[1].float().abs().repeat_interleave(128, 1)[:, dead]
    assert ((back - weight)[:, dead].abs() <= 1.001 * step).all()
    assert _same(gptq(weight, torch.zeros(300, 300)), INT4.quantize(weight))


def test_fewer_tokens_than_inputs():
    """A singular Hessian: damping makes it regular."""
    weight, x = _weight(6), _inputs(6, rows=3)
    calibrated = gptq(weight, x.T @ x)
    assert _output_error(weight, x, calibrated) < 0.5 * _output_error(weight, x, INT4.quantize(weight))


def test_what_no_damping_mends_is_rounded():
    """Not a sum of squares: numbers gone wrong somewhere."""
    weight, hessian = _weight(7, width=128), torch.eye(128)
    hessian[0, 1] = hessian[1, 0] = 100
    assert _same(gptq(weight, hessian), INT4.quantize(weight))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_group(wrong):
    weight, x = _weight(8), _inputs(8)
    good = gptq(weight, x.T @ x)
    weight[3, 130] = wrong
    packed, scale = gptq(weight, x.T @ x)
    others = torch.arange(24) != 3
    assert torch.equal(packed[others], good[0][others])
    assert torch.equal(scale[others], good[1][others])
    assert scale[3].isnan().tolist() == [False, True, False]
