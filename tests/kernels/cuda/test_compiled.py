"""Every Triton kernel at the sizes of the real model, compiled for GPUs: it fits, and spills no registers."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from wemm.benchmark.ops import _Sizes, model_shapes
from wemm.ops.registry import OPS

SHAPES = model_shapes("wemm-chat-2k-cn")
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}  # that a block may have, says the CUDA programming guide
MAX_GRID = (2**31 - 1, 65_535, 65_535)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
TARGETS = [
    pytest.param(
        capability,
        dtype,
        marks=() if (capability, dtype) == (90, torch.bfloat16) else pytest.mark.slow,
        id=f"{capability}-{dtype}",
    )
    for capability in SHARED_BYTES
    for dtype in DTYPES
]
KERNELS = [
    pytest.param(op, i, marks=() if i.automatic else pytest.mark.slow, id=f"{op.name}-{i.name}")
    for op in OPS.values()
    for i in op.implementations
    if i.device == "cuda" and i.name.startswith("triton")
]


@pytest.mark.parametrize(("capability", "dtype"), TARGETS)
@pytest.mark.parametrize(("op", "implementation"), KERNELS)
def test_kernels_fit(op, implementation, capability, dtype, compiled):
    taken = _taken(op, implementation, dtype)
    if not taken:
        pytest.skip("no case of this dtype is taken")
    launches = compiled(capability, lambda: [implementation.function(*arguments) for arguments in taken])
    assert launches
    for launch in launches:
        assert launch.shared_bytes <= SHARED_BYTES[capability], launch
        assert all(size <= most for size, most in zip(launch.grid, MAX_GRID, strict=False)), launch
        # Products of float32, which no tensor core computes, take more registers than there are.
        assert launch.stack_bytes == 0 or dtype is torch.float32, launch


@pytest.mark.parametrize(("op", "implementation"), KERNELS)
def test_kernels_take_cases_of_the_model(op, implementation):
    assert any(_taken(op, implementation, dtype) for dtype in DTYPES), "never compiled"


@pytest.mark.parametrize(
    ("name", "case", "kernel"),
    [
        ("linear_int8", "wo, decode 1", "_quantize_rows"),
        ("rope_and_store_kv", "prefill 1024, int8", "_rope_and_store_kv"),
    ],
)
def test_numbers_are_rounded_before_they_become_integers(name, case, kernel, compiled):
    """As the definition rounds them: a product and a sum are two instructions. The interpreter fuses none."""
    arguments = OPS[name].model_cases(_Sizes(torch.bfloat16), SHAPES)[case]()
    [implementation] = [i for i in OPS[name].implementations if i.name == "triton"]
    [launch] = [
        found for found in compiled(90, lambda: implementation.function(*arguments)) if found.name == kernel
    ]
    assert "add.rn.f32" in launch.ptx
    assert "fma" not in launch.ptx


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_pixels_are_normalised_as_the_definition_rounds(capability, dtype, compiled):
    """As above. In float32 the products of samples and weights are fused, so there it cannot be seen."""
    op = OPS["embed_patches"]
    [arguments] = _taken(op, op.implementations[0], dtype)
    [launch] = compiled(capability, lambda: op.implementations[0].function(*arguments))
    assert "fma" not in launch.ptx


def _taken(op, implementation, dtype):
    cases = [case() for case in op.model_cases(_Sizes(dtype), SHAPES).values()]
    return [arguments for arguments in cases if implementation.supports(*arguments)]
