"""One program per row, which stays in registers between the sum and the scaling."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from wemm.kernels.cuda.tensors import FLOATS, MAX_ROW, are, row_block
from wemm.ops.rms_norm import rms_norm


@triton.jit
def _rms_norm(x, total, weight, out, eps, width, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * width
    columns = tl.arange(0, BLOCK)
    is_column = columns < width
    values = tl.load(x + start + columns, mask=is_column, other=0.0).to(tl.float32)
    if total is not None:
        values += tl.load(total + start + columns, mask=is_column, other=0.0).to(tl.float32)
        values = values.to(total.dtype.element_ty)  # the norm is that of the sum as it is stored
        tl.store(total + start + columns, values, mask=is_column)
        values = values.to(tl.float32)
    factors = tl.load(weight + columns, mask=is_column, other=0.0).to(tl.float32)
    values *= tl.rsqrt(tl.sum(values * values, 0) / width + eps)
    tl.store(out + start + columns, (values * factors).to(out.dtype.element_ty), mask=is_column)


def takes(x: torch.Tensor, weight: torch.Tensor, eps: float) -> bool:
    """Also those of add_rms_norm."""
    return x.dtype in FLOATS and are(x.dtype, x, weight) and 0 < x.shape[-1] <= MAX_ROW


def normed(x: torch.Tensor, weight: torch.Tensor, eps: float, total: torch.Tensor | None = None) -> torch.Tensor:
    """Of x, or of x + total, which `total` then holds."""
    out = torch.empty_like(x)
    width = x.shape[-1]
    block, num_warps = row_block(width)
    if x.numel():
        _rms_norm[(x.numel() // width,)](x, total, weight, out, eps, width, BLOCK=block, num_warps=num_warps)
    return out


@rms_norm.impl("triton", "cuda", takes)
def _(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return normed(x, weight, eps)
