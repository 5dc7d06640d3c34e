"""The activation ends the product: what it is applied to is never in memory."""

from __future__ import annotations

import torch

from wemm.kernels.cuda.linear_int8 import product, takes
from wemm.ops.linear_int8_gelu import linear_int8_gelu


@linear_int8_gelu.impl("triton", "cuda", takes)
def _(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return product(x, weight, scale, bias, gelu=True)
