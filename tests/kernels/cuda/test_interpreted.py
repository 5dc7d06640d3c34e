"""Every Triton kernel on the cases of its op, at the published tolerance, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from tests.ops.test_parity import check
from wemm.ops.registry import OPS

KERNELS = [
    pytest.param(op, i.name, marks=() if i.automatic else pytest.mark.slow, id=f"{op.name}-{i.name}")
    for op in OPS.values()
    for i in op.implementations
    if i.device == "cuda" and i.name.startswith("triton")
]


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("op", "implementation"), KERNELS)
def test_parity(op, implementation, dtype):
    assert check(op, implementation, dtype, torch.device("cpu")) > 0
