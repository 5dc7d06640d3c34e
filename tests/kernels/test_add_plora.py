"""PLoRA where the rows lie: any rows in any order, runs of them, other rows untouched."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import wemm.kernels.cpu.linear
from wemm.kernels import load_kernels
from wemm.ops.add_plora import add_plora
from wemm.ops.registry import DEFINITION

load_kernels("cpu")
BUILT = importlib.util.find_spec("wemm.kernels.cpu._kernels") is not None
pytestmark = pytest.mark.skipif(not BUILT, reason="the C++ extension is not built here")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _arguments(rows, num_tokens, out, width, rank, dtype, scaling=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = (num_tokens, out), (num_tokens, width), (rank, width), (out, rank)
    y, x, a, b = (torch.randn(size, generator=generator) for size in sizes)
    a, b = a * width**-0.5, b * rank**-0.5
    return *(t.to(dtype) for t in (y, x, a, b)), scaling, torch.tensor(rows, dtype=torch.int64)


def _run(kernel, y, *others):
    with torch.inference_mode(), add_plora.using(kernel):
        result = y.clone()
        assert add_plora(result, *others) is result
    return result


def _check(arguments):
    """Within the tolerance of the float32 definition on the image rows, and the others bit for bit."""
    y, image_rows = arguments[0], arguments[-1]
    got = _run("in_place", *arguments)
    wide = [a.float() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments]
    tolerance = add_plora.tolerances[y.dtype]
    expected = _run(DEFINITION, *wide)
    torch.testing.assert_close(got.float(), expected, rtol=tolerance.rtol, atol=tolerance.atol)
    others = torch.ones(len(y), dtype=torch.bool)
    others[image_rows] = False
    assert torch.equal(got[others], y[others])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    runs=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 120)), max_size=4),
    out=st.integers(1, 130),
    width=st.integers(1, 130),
    rank=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_runs_of_any_length(runs, out, width, rank, dtype, seed):
    """(rows between, rows of an image) of several images, text behind them."""
    rows, end = [], 0
    for gap, length in runs:
        rows += range(end + gap, end + gap + length)
        end += gap + length
    _check(_arguments(rows, end + 3, out, width, rank, dtype, seed=seed))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.integers(0, 99), unique=True, max_size=100),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_rows_in_any_order(rows, dtype, seed):
    _check(_arguments(rows, 100, 48, 32, 8, dtype, seed=seed))


def test_runs_in_falling_order():
    _check(_arguments([*range(60, 100), *range(5, 50)], 100, 48, 32, 8, torch.float32))


def test_one_rounding_less_than_the_definition():
    """The sum is rounded once: never further from the float32 result than what the definition makes of it."""
    arguments = _arguments(range(4, 200), 204, 256, 256, 64, torch.bfloat16)
    oracle = _run(DEFINITION, *(a.float() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
                                for a in arguments))  # fmt: skip
    mine, definition = ((_run(k, *arguments).float() - oracle).norm() for k in ("in_place", DEFINITION))
    assert mine <= definition * 1.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_without_a_product_of_onednn(monkeypatch, dtype):
    monkeypatch.setitem(wemm.kernels.cpu.linear.HAS_PRODUCT, dtype, False)
    _check(_arguments(range(3, 80), 90, 48, 32, 8, dtype))


@pytest.mark.parametrize("wrong", [torch.inf, torch.nan])
@pytest.mark.parametrize("rows", [range(3, 80), range(3, 80, 2)], ids=["run", "scattered"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_shows(dtype, rows, wrong):
    for place in range(4):
        arguments = _arguments(rows, 90, 48, 32, 8, dtype)
        arguments[place][5, 5] = wrong
        assert not _run("in_place", *arguments)[rows].isfinite().all()


def test_no_temporary_of_the_size_of_the_result():
    """One image: nothing wider than the rank is allocated."""
    arguments = _arguments(range(1000), 1001, 2048, 64, 8, torch.float32)
    with torch.inference_mode(), torch.profiler.profile(profile_memory=True) as profile:
        add_plora(*arguments)
    largest = max((event.cpu_memory_usage for event in profile.events()), default=0)
    assert largest < arguments[0].nbytes / 10
