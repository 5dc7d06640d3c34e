"""A program per row looks for the least probability kept, by bisection; the row stays in the L2 cache."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from wemm.kernels.cuda.tensors import are
from wemm.ops.keep_top_p import ONE, keep_top_p

BLOCK = 8192
"""With 32 warps 8 numbers a thread: two loads of 16 bytes."""
_ONE = tl.constexpr(ONE)
_MOST = tl.constexpr(2**31 - 1)


@triton.jit
def _keep_top_p(probs, top_p, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    probs += row.to(tl.int64) * width
    out += row.to(tl.int64) * width
    columns = tl.arange(0, BLOCK)
    masses = tl.zeros([BLOCK], tl.int64)
    largest = tl.zeros([BLOCK], tl.int32)
    for first in range(0, width, BLOCK):
        values = tl.load(probs + first + columns, mask=first + columns < width, other=0.0)
        masses += (values * _ONE).to(tl.int64)
        largest = tl.maximum(largest, values.to(tl.int32, bitcast=True))
    share = tl.load(top_p + row).to(tl.float64)
    wanted = tl.where(share < 1, tl.maximum(share * tl.sum(masses, 0).to(tl.float64), 1.0), float("inf"))
    # Probabilities are ordered as their bits are. Up to low they are dropped, above it from high on they are kept.
    low = tl.full([], -1, tl.int32)
    high = tl.max(largest, 0)
    while high - low > 1:
        middle = low + (high - low) // 2
        masses = tl.zeros([BLOCK], tl.int64)
        above = tl.full([BLOCK], _MOST, tl.int32)
        below = tl.full([BLOCK], -1, tl.int32)
        for first in range(0, width, BLOCK):
            values = tl.load(probs + first + columns, mask=first + columns < width, other=0.0)
            bits = values.to(tl.int32, bitcast=True)
            is_above = bits > middle
            masses += (tl.where(is_above, values, 0.0) * _ONE).to(tl.int64)
            above = tl.minimum(above, tl.where(is_above, bits, _MOST))
            below = tl.maximum(below, tl.where(is_above, -1, bits))
        # On to the next number that the row has: 5 to 20 steps where halving alone takes 31.
        if tl.sum(masses, 0).to(tl.float64) < wanted:
            high = tl.max(below, 0)
        else:
            low = tl.min(above, 0) - 1
    for first in range(0, width, BLOCK):
        values = tl.load(probs + first + columns, mask=first + columns < width, other=0.0)
        kept = tl.where(values.to(tl.int32, bitcast=True) > low, values, 0.0)
        tl.store(out + first + columns, kept, mask=first + columns < width)


def _supports(probs: torch.Tensor, top_p: torch.Tensor) -> bool:
    # Columns are counted in 32 bits.
    return are(torch.float32, probs, top_p) and 0 < probs.shape[1] < 2**31 - BLOCK


@keep_top_p.impl("triton", "cuda", _supports)
def _(probs: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(probs)
    _keep_top_p[(probs.shape[0],)](probs, top_p, out, probs.shape[1], BLOCK=BLOCK, num_warps=32)
    return out
