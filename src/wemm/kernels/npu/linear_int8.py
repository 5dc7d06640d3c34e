"""npu_dynamic_quant rounds the tokens, npu_quant_matmul multiplies integers: the arithmetic of the definition."""

from __future__ import annotations

import torch
import torch_npu

from wemm.ops.linear_int8 import linear_int8

_LARGEST_SIZE = 65535


def takes(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
    """Also those of linear_int8_gelu."""
    dtypes = x.dtype in (torch.float16, torch.bfloat16) and (bias is None or bias.dtype == x.dtype)
    sizes = x.dim() == 2 and x.numel() > 0 and max(weight.shape) <= _LARGEST_SIZE
    return dtypes and sizes and weight.is_contiguous()


@linear_int8.impl("torch_npu", device="npu", supports=takes)
def product(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """linear_int8."""
    integers, x_scale = torch_npu.npu_dynamic_quant(x)
    return torch_npu.npu_quant_matmul(
        integers, weight.t(), scale, pertoken_scale=x_scale, bias=bias, output_dtype=x.dtype
    )
