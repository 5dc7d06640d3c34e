"""One program per row, which stays in registers between the sum and the scaling."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from wemm.kernels.cuda.tensors import FLOATS, MAX_ROW, are, row_block
from wemm.ops.rms_norm import rms_norm


@triton.jit
def _rms_norm(x, weight, out, eps, width, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * width
    columns = tl.arange(0, BLOCK)
    is_column = columns < width
    values = tl.load(x + start + columns, mask=is_column, other=0.0).to(tl.float32)
    factors = tl.load(weight + columns, mask=is_column, other=0.0).to(tl.float32)
    values *= tl.rsqrt(tl.sum(values * values, 0) / width + eps)
    tl.store(out + start + columns, (values * factors).to(out.dtype.element_ty), mask=is_column)


def _supports(x: torch.Tensor, weight: torch.Tensor, eps: float) -> bool:
    return x.dtype in FLOATS and are(x.dtype, x, weight) and 0 < x.shape[-1] <= MAX_ROW


@rms_norm.impl("triton", "cuda", _supports)
def _(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    out = torch.empty_like(x)
    width = x.shape[-1]
    block, num_warps = row_block(width)
    _rms_norm[(x.numel() // width,)](x, weight, out, eps, width, BLOCK=block, num_warps=num_warps)
    return out
