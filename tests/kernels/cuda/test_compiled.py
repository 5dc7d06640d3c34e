"""Every Triton kernel at the sizes of the real model, compiled for GPUs: it fits, and spills no registers."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from wemm.benchmark.ops import _Sizes, model_shapes
from wemm.ops.registry import OPS

SHAPES = model_shapes("wemm-chat-2k-cn")
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}  # of a block, at most: CUDA C++ Programming Guide, table 30
MAX_GRID = (2**31 - 1, 65_535, 65_535)
KERNELS = [
    pytest.param(op, i, marks=() if i.automatic else pytest.mark.slow, id=f"{op.name}-{i.name}")
    for op in OPS.values()
    for i in op.implementations
    if i.device == "cuda" and i.name.startswith("triton")
]


@pytest.mark.parametrize("capability", SHARED_BYTES)
@pytest.mark.parametrize(("op", "implementation"), KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
def test_kernels_fit(op, implementation, dtype, capability, compiled):
    cases = op.model_cases(_Sizes(dtype), SHAPES)
    arguments = [arguments for case in cases.values() if implementation.supports(*(arguments := case()))]
    assert arguments, "a kernel that takes no case of the model is never measured"
    for launch in compiled(capability, lambda: [implementation.function(*given) for given in arguments]):
        assert launch.shared_bytes <= SHARED_BYTES[capability], launch
        assert launch.stack_bytes == 0, launch
        assert all(size <= most for size, most in zip(launch.grid, MAX_GRID, strict=False)), launch
