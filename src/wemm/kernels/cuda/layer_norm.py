"""One program per row, which stays in registers between mean, variance and scaling."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from wemm.kernels.cuda.tensors import FLOATS, MAX_ROW, are, row_block
from wemm.ops.layer_norm import layer_norm


@triton.jit
def _layer_norm(x, weight, bias, out, eps, width, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * width
    columns = tl.arange(0, BLOCK)
    is_column = columns < width
    values = tl.load(x + start + columns, mask=is_column, other=0.0).to(tl.float32)
    factors = tl.load(weight + columns, mask=is_column, other=0.0).to(tl.float32)
    offsets = tl.load(bias + columns, mask=is_column, other=0.0).to(tl.float32)
    centred = tl.where(is_column, values - tl.sum(values, 0) / width, 0.0)
    normed = centred * tl.rsqrt(tl.sum(centred * centred, 0) / width + eps)
    tl.store(out + start + columns, (normed * factors + offsets).to(out.dtype.element_ty), mask=is_column)


def _supports(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> bool:
    return x.dtype in FLOATS and are(x.dtype, x, weight, bias) and 0 < x.shape[-1] <= MAX_ROW


@layer_norm.impl("triton", "cuda", _supports)
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    out = torch.empty_like(x)
    width = x.shape[-1]
    block, num_warps = row_block(width)
    _layer_norm[(x.numel() // width,)](x, weight, bias, out, eps, width, BLOCK=block, num_warps=num_warps)
    return out
