"""Flash decoding: a context is shared among programs, whose results a second kernel joins.

The grid depends on shapes alone and lengths are read on the device: a recorded step is replayed as contexts grow.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from wemm.kernels.cuda.flash_attention import LOG2_E, caches_and_scales, load_cached, softmax_step, takes_cache
from wemm.ops.decode_attention import decode_attention

_KEYS = {torch.float32: 32, torch.bfloat16: 64, torch.float16: 64}
_ROWS = 16  # the fewest a tensor core multiplies; a group of query heads has fewer
_PROGRAMS = 264  # two for each multiprocessor of an H100; others were not tried
_MOST_SPLITS = 128


@triton.jit
def _split_len(seq_len, num_splits, KEYS: tl.constexpr):
    """Keys of each program that takes part in a context."""
    return tl.cdiv(tl.cdiv(seq_len, KEYS), num_splits) * KEYS


@triton.jit(do_not_specialize=["max_blocks"])
def _decode_attention(
    query, key_cache, value_cache, key_scales, value_scales, block_tables, seq_lens, out, log2_totals,
    log2_scale, max_blocks,
    HEAD_DIM: tl.constexpr, GROUP: tl.constexpr, BLOCK_SIZE: tl.constexpr, IS_INT8: tl.constexpr,
    IS_SPLIT: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The query heads of one KV head over a part of the context of one sequence."""
    kv_head = tl.program_id(0)
    num_kv_heads = tl.num_programs(0)
    split = tl.program_id(1)
    seq = tl.program_id(2)
    seq_len = tl.load(seq_lens + seq)
    length = _split_len(seq_len, tl.num_programs(1), KEYS)
    first = split * length
    if first >= seq_len:
        return
    end = tl.minimum(first + length, seq_len)
    columns = tl.arange(0, HEAD_DIM)[None, :]
    rows = tl.arange(0, ROWS)
    is_row = rows < GROUP
    heads = (seq * num_kv_heads + kv_head).to(tl.int64) * GROUP + rows
    q = tl.load(query + heads[:, None] * HEAD_DIM + columns, mask=is_row[:, None], other=0.0)
    table = block_tables + seq.to(tl.int64) * max_blocks
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    y = tl.zeros((ROWS, HEAD_DIM), tl.float32)
    for first_key in range(first, end, KEYS):
        keys = first_key + tl.arange(0, KEYS)
        is_key = keys < end
        block = tl.load(table + keys // BLOCK_SIZE, mask=is_key, other=0)
        slots = (block.to(tl.int64) * BLOCK_SIZE + keys % BLOCK_SIZE) * num_kv_heads + kv_head
        k = load_cached(key_cache, key_scales, slots, is_key, q.dtype, HEAD_DIM, IS_INT8, True)
        v = load_cached(value_cache, value_scales, slots, is_key, q.dtype, HEAD_DIM, IS_INT8, True)
        scores = tl.dot(q, k.T, input_precision="ieee")
        scores = tl.where(is_key[None, :], scores, float("-inf"))
        weights, shrink, largest, total = softmax_step(scores, log2_scale, largest, total)
        y = tl.dot(weights.to(q.dtype), v, y * shrink[:, None], input_precision="ieee")
    results = heads * tl.num_programs(1) + split
    y = (y / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + results[:, None] * HEAD_DIM + columns, y, mask=is_row[:, None])
    if IS_SPLIT:
        tl.store(log2_totals + results, largest + tl.log2(total), mask=is_row)


@triton.jit(do_not_specialize=["num_splits"])
def _join(
    parts, log2_totals, seq_lens, out, num_splits,
    HEAD_DIM: tl.constexpr, MAX_SPLITS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Parts weighted by their shares of the sum of exponents: one head of one sequence."""
    seq = tl.program_id(1)
    head = seq.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    seq_len = tl.load(seq_lens + seq)
    splits = tl.arange(0, MAX_SPLITS)
    is_used = (splits < num_splits) & (splits * _split_len(seq_len, num_splits, KEYS) < seq_len)
    columns = tl.arange(0, HEAD_DIM)
    totals = tl.load(log2_totals + head * num_splits + splits, mask=is_used, other=float("-inf"))
    weights = tl.exp2(totals - tl.max(totals, 0))
    at = (head * num_splits + splits)[:, None] * HEAD_DIM + columns[None, :]
    y = tl.sum(tl.load(parts + at, mask=is_used[:, None], other=0.0) * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(out + head * HEAD_DIM + columns, y.to(out.dtype.element_ty))


def _supports(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
) -> bool:
    indices = all(x.dtype is torch.int32 and x.is_contiguous() for x in (block_tables, seq_lens))
    group = query.shape[1] // key_cache.shape[2]
    return indices and group <= _ROWS and scale > 0 and takes_cache(query, key_cache, value_cache)


@decode_attention.impl("triton", device="cuda", supports=_supports)
def _(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    num_seqs, num_heads, head_dim = query.shape
    block_size, num_kv_heads = key_cache.shape[1:3]
    max_blocks = block_tables.shape[1]
    keys = _KEYS[query.dtype]
    num_splits = _num_splits(num_seqs * num_kv_heads, -(-max_blocks * block_size // keys))
    out = torch.empty_like(query)
    parts, log2_totals = out, out
    if num_splits > 1:
        parts = query.new_empty((num_seqs, num_heads, num_splits, head_dim), dtype=torch.float32)
        log2_totals = query.new_empty((num_seqs, num_heads, num_splits), dtype=torch.float32)
    is_int8 = key_cache.dtype is torch.int8
    _decode_attention[num_kv_heads, num_splits, num_seqs](
        query, *caches_and_scales(key_cache, value_cache), block_tables, seq_lens, parts, log2_totals,
        scale * LOG2_E, max_blocks,
        HEAD_DIM=head_dim, GROUP=num_heads // num_kv_heads, BLOCK_SIZE=block_size, IS_INT8=is_int8,
        IS_SPLIT=num_splits > 1, ROWS=_ROWS, KEYS=keys, num_warps=4, num_stages=3,
    )  # fmt: skip
    if num_splits > 1:
        _join[num_heads, num_seqs](
            parts, log2_totals, seq_lens, out, num_splits,
            HEAD_DIM=head_dim, MAX_SPLITS=triton.next_power_of_2(num_splits), KEYS=keys, num_warps=4,
        )  # fmt: skip
    return out


def _num_splits(num_programs: int, max_parts: int) -> int:
    """Enough programs for the device, and none that no context could give a key."""
    return max(1, min(_PROGRAMS // num_programs, max_parts, _MOST_SPLITS))
