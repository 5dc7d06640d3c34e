"""linear_int8, then torch's own GELU."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from wemm.kernels.npu.linear_int8 import product, takes
from wemm.ops.linear_int8_gelu import linear_int8_gelu


@linear_int8_gelu.impl("torch_npu", device="npu", supports=takes)
def _(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.gelu(product(x, weight, scale, bias), approximate="tanh")
