"""Blocks of rows of packed sequences, found without the host reading where the sequences lie."""

from __future__ import annotations

import triton
import triton.language as tl


def num_packed_blocks(num_rows: int, num_seqs: int, rows_per_block: int) -> int:
    """Programs that cover all sequences, however long each is; a few find nothing to do."""
    return num_rows // rows_per_block + num_seqs


@triton.jit
def find_block(cu_seqlens, num_seqs, block, ROWS_PER_BLOCK: tl.constexpr):
    """Sequence and first row within it, which may lie behind its end, of a block.

    Sequence i owns the blocks from cu_seqlens[i] // ROWS_PER_BLOCK + i on: no fewer than it needs.
    """
    low = 0
    high = num_seqs
    while high - low > 1:
        middle = (low + high) // 2
        is_reached = tl.load(cu_seqlens + middle) // ROWS_PER_BLOCK + middle <= block
        low = tl.where(is_reached, middle, low)
        high = tl.where(is_reached, high, middle)
    return low, (block - tl.load(cu_seqlens + low) // ROWS_PER_BLOCK - low) * ROWS_PER_BLOCK
