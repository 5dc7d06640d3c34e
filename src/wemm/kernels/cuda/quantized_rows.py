"""Activations rounded to int8 as quantization.quantize_rows does, bit for bit."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from wemm.kernels.cuda.tensors import MAX_ROW, row_block


@triton.jit
def magnitude(values):
    """Bits of float32 without the sign: ordered as the numbers are, NaN above Inf."""
    return values.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def int8_scale(largest):
    """The largest magnitude of a row → its scale, NaN where the row cannot be rounded, and what rounds it.

    The kernel that calls this must be launched with enable_fp_fusion=False: products are rounded before what is
    added to them.
    """
    largest = largest.to(tl.float32, bitcast=True)
    inverse = tl.div_rn(1.0, largest) * 127.0  # as torch divides a number by a tensor
    is_sound = (largest < float("inf")) & (inverse < float("inf"))
    scale = tl.where(is_sound, tl.div_rn(largest, 127.0), float("nan"))
    return tl.where(largest == 0, 0.0, scale), tl.where(is_sound, inverse, 0.0)


@triton.jit
def round_to_int8(values, inverse):
    """Halves to the even neighbour: 1.5 * 2**23 is added, whose lowest byte is zero."""
    return (values * inverse + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def _quantize_rows(x, integers, scale, width, stored_width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    values = tl.load(x + row * width + columns, mask=columns < width, other=0.0).to(tl.float32)
    row_scale, inverse = int8_scale(tl.max(magnitude(values), 0))
    rounded = round_to_int8(values, inverse)
    tl.store(integers + row * stored_width + columns, rounded, mask=columns < stored_width)
    tl.store(scale + row, row_scale)


def fits(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether rows of x are held by a program, and all offsets of the product by 32 bits."""
    sizes = x.numel(), weight.numel(), x.shape[0] * weight.shape[0]
    return x.dim() == 2 and x.shape[1] <= MAX_ROW and max(sizes) < 2**31


def quantize_rows(x: torch.Tensor, multiple: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """[n, size] → int8 [n, size filled up with zeros to a multiple], scale float32 [n]."""
    rows, width = x.shape
    stored_width = triton.cdiv(width, multiple) * multiple
    integers = torch.empty(rows, stored_width, dtype=torch.int8, device=x.device)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    block, num_warps = row_block(stored_width)
    _quantize_rows[(rows,)](
        x, integers, scale, width, stored_width, BLOCK=block, num_warps=num_warps, enable_fp_fusion=False
    )
    return integers, scale
