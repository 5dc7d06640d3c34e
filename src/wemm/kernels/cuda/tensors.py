"""What all kernels ask of their tensors, and how many threads share a row."""

from __future__ import annotations

import torch
import triton

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MAX_ROW = 2**15
"""Numbers of a row that one program keeps in registers."""
_NUMBERS_PER_WARP = 512  # 16 a thread: two loads of 16 bytes


def are(dtype: torch.dtype, *tensors: torch.Tensor | None) -> bool:
    """Whether those given are of a dtype and contiguous."""
    return all(t.dtype is dtype and t.is_contiguous() for t in tensors if t is not None)


def row_block(length: int) -> tuple[int, int]:
    """Block and number of warps that hold a row."""
    block: int = triton.next_power_of_2(length)
    return block, min(16, max(1, block // _NUMBERS_PER_WARP))
