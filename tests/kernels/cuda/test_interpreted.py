"""Every Triton kernel on the cases of its op, at the published tolerance, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from tests.ops.test_parity import DTYPES, check
from wemm.ops.registry import OPS

KERNELS = [
    pytest.param(op, i.name, marks=() if i.automatic else pytest.mark.slow, id=f"{op.name}-{i.name}")
    for op in OPS.values()
    for i in op.implementations
    if i.device == "cuda" and i.name.startswith("triton")
]


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("op", "implementation"), KERNELS)
def test_parity(op, implementation):
    ran = [check(op, implementation, dtype, torch.device("cpu")) for dtype in DTYPES]
    assert any(ran), "a kernel that takes no case is never compared"
