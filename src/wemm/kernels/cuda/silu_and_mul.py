"""One pass, nothing of float32 in memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from wemm.kernels.cuda.tensors import FLOATS, are
from wemm.ops.silu_and_mul import silu_and_mul

BLOCK = 2048
"""With eight warps 8 numbers a thread: 16 bytes of 16-bit numbers."""


@triton.jit
def gated(gate, up):
    """silu(gate) * up of numbers of one dtype, in float32, rounded once."""
    g, u = gate.to(tl.float32), up.to(tl.float32)
    return (g / (1 + tl.exp(-g)) * u).to(gate.dtype)


@triton.jit
def _silu_and_mul(gate, up, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + at, mask=at < count, other=0.0)
    u = tl.load(up + at, mask=at < count, other=0.0)
    tl.store(out + at, gated(g, u), mask=at < count)


def _supports(gate: torch.Tensor, up: torch.Tensor) -> bool:
    return gate.dtype in FLOATS and are(gate.dtype, gate, up)


@silu_and_mul.impl("triton", "cuda", _supports)
def _(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(gate)
    _silu_and_mul[(triton.cdiv(gate.numel(), BLOCK),)](gate, up, out, gate.numel(), BLOCK=BLOCK, num_warps=8)
    return out
