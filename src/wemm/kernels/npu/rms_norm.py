"""npu_rms_norm."""

from __future__ import annotations

import torch
import torch_npu

from wemm.ops.rms_norm import rms_norm

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
"""Of norms, activations and rotations; attention and products take the first two."""


def _supports(x: torch.Tensor, weight: torch.Tensor, eps: float) -> bool:
    return x.dtype in DTYPES and weight.dtype == x.dtype and 2 <= x.dim() <= 8 and x.numel() > 0


@rms_norm.impl("torch_npu", device="npu", supports=_supports)
def _(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return torch_npu.npu_rms_norm(x, weight, epsilon=eps)[0]
