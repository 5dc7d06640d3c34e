"""npu_swiglu, which takes both halves in one tensor."""

from __future__ import annotations

import torch
import torch_npu

from wemm.kernels.npu.rms_norm import DTYPES
from wemm.ops.silu_and_mul import silu_and_mul


def _supports(gate: torch.Tensor, up: torch.Tensor) -> bool:
    return gate.dtype in DTYPES and up.dtype == gate.dtype and gate.numel() > 0


@silu_and_mul.impl("torch_npu", device="npu", supports=_supports)
def _(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return torch_npu.npu_swiglu(torch.cat((gate, up), dim=-1), dim=-1)
