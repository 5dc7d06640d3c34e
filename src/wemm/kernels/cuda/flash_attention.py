"""What the attention kernels share: blocks of packed sequences, and the softmax that reads every key once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

HALVES = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALVES)
LOG2_E = math.log2(math.e)  # exp2 is what the hardware computes
MAX_HEAD_DIM = 256


@dataclass(frozen=True)
class Tiles:
    """Queries and keys multiplied at a time, and what computes them."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int


def num_packed_blocks(num_rows: int, num_seqs: int, rows_per_block: int) -> int:
    """Programs that cover all sequences, however long each is: the host never reads where they lie."""
    return num_rows // rows_per_block + num_seqs


@triton.jit
def find_block(cu_seqlens, num_seqs, block, ROWS_PER_BLOCK: tl.constexpr):
    """Sequence of a block, and its first row therein, which may lie behind the end.

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


@triton.jit
def softmax_step(scores, log2_scale, largest, total):
    """Weights of these keys, the factor that earlier sums shrink by, and the new largest score and sum of weights.

    Scores are scaled here, by a number above 0; largest is a scaled score, in units of log 2.
    """
    new_largest = tl.maximum(largest, tl.max(scores, 1) * log2_scale)
    weights = tl.exp2(scores * log2_scale - new_largest[:, None])
    shrink = tl.exp2(largest - new_largest)
    return weights, shrink, new_largest, total * shrink + tl.sum(weights, 1)


@triton.jit
def load_cached(
    cache, scales, slots, is_key, dtype, HEAD_DIM: tl.constexpr, IS_INT8: tl.constexpr, IS_MASKED: tl.constexpr
):
    """Keys or values [keys, HEAD_DIM] of one head, as they are multiplied; zeros behind the end."""
    ROW: tl.constexpr = HEAD_DIM + 4 if IS_INT8 else HEAD_DIM
    at = slots[:, None] * ROW + tl.arange(0, HEAD_DIM)[None, :]
    rows = tl.load(cache + at, mask=is_key[:, None], other=0) if IS_MASKED else tl.load(cache + at)
    if IS_INT8:
        scale = tl.load(scales + slots * (ROW // 4) + HEAD_DIM // 4, mask=is_key, other=0.0)
        rows = (rows.to(tl.float32) * scale[:, None]).to(dtype)
    return rows


def caches_and_scales(key_cache: torch.Tensor, value_cache: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The caches, and the same memory read as float32: in caches of int8 the last number of a row is its scale."""
    if key_cache.dtype is not torch.int8:
        return key_cache, value_cache, key_cache, value_cache
    return key_cache, value_cache, key_cache.view(torch.float32), value_cache.view(torch.float32)


def takes_cache(query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor) -> bool:
    """Dtypes, layouts and head_dim of queries over a paged cache."""
    stored = torch.int8 if key_cache.dtype is torch.int8 else query.dtype
    caches = all(x.dtype is stored and x.is_contiguous() for x in (key_cache, value_cache))
    head_dim = query.shape[-1]
    is_size = head_dim == triton.next_power_of_2(head_dim) and 16 <= head_dim <= MAX_HEAD_DIM
    return caches and is_size and query.dtype in DTYPES and query.is_contiguous()
