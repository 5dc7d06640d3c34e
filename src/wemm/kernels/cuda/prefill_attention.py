"""Flash attention, causal and over the paged cache; heads that share keys and values load them once."""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl

from wemm.kernels.cuda.flash_attention import (
    HALVES,
    LOG2_E,
    Tiles,
    caches_and_scales,
    find_block,
    load_cached,
    num_packed_blocks,
    softmax_step,
    takes_cache,
)
from wemm.ops.prefill_attention import prefill_attention

# Queries are tokens times the heads of a group: the largest that spill no registers on capability 8.0 and 9.0. On
# an H200, 128x32 takes 1.1 to 1.2 times as long as CHOSEN, and INT8's 1.4 to 1.6 times.
CHOSEN = Tiles(128, 64, 8, 3)
INT8 = Tiles(64, 64, 8, 3)
FLOAT32 = Tiles(32, 32, 8, 1)


@triton.jit
def _attend(
    query, key_cache, value_cache, key_scales, value_scales, table, kv_head, num_kv_heads, first_key, last_keys,
    log2_scale, largest, total, y,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, IS_INT8: tl.constexpr, KEYS: tl.constexpr,
    IS_DIAGONAL: tl.constexpr,
):  # fmt: skip
    """Over KEYS keys; on the diagonal, row by row up to last_keys."""
    keys = first_key + tl.arange(0, KEYS)
    is_key = keys <= tl.max(last_keys, 0)
    if IS_DIAGONAL:
        block = tl.load(table + keys // BLOCK_SIZE, mask=is_key, other=0)
    else:
        block = tl.load(table + keys // BLOCK_SIZE)
    slots = (block.to(tl.int64) * BLOCK_SIZE + keys % BLOCK_SIZE) * num_kv_heads + kv_head
    k = load_cached(key_cache, key_scales, slots, is_key, query.dtype, HEAD_DIM, IS_INT8, IS_DIAGONAL)
    v = load_cached(value_cache, value_scales, slots, is_key, query.dtype, HEAD_DIM, IS_INT8, IS_DIAGONAL)
    scores = tl.dot(query, k.T, input_precision="ieee")
    if IS_DIAGONAL:
        scores = tl.where(keys[None, :] <= last_keys[:, None], scores, float("-inf"))
    weights, shrink, largest, total = softmax_step(scores, log2_scale, largest, total)
    y = tl.dot(weights.to(query.dtype), v, y * shrink[:, None], input_precision="ieee")
    return largest, total, y


@triton.jit(do_not_specialize=["num_seqs", "max_blocks"])
def _prefill_attention(
    query, key_cache, value_cache, key_scales, value_scales, block_tables, cu_seqlens_q, seq_lens, out,
    num_seqs, max_blocks, log2_scale,
    HEAD_DIM: tl.constexpr, GROUP: tl.constexpr, BLOCK_SIZE: tl.constexpr, IS_INT8: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The query heads of one KV head at a few tokens of one sequence."""
    TOKENS: tl.constexpr = QUERIES // GROUP
    # What comes last in a sequence has most to do, and starts first.
    seq, first = find_block(cu_seqlens_q, num_seqs, tl.num_programs(0) - 1 - tl.program_id(0), TOKENS)
    start = tl.load(cu_seqlens_q + seq)
    num_new = tl.load(cu_seqlens_q + seq + 1) - start
    if first >= num_new:
        return
    kv_head = tl.program_id(1)
    num_kv_heads = tl.num_programs(1)
    rows = tl.arange(0, QUERIES)
    tokens = first + rows // GROUP
    is_row = (tokens < num_new) & (rows < TOKENS * GROUP)
    heads = ((start + tokens).to(tl.int64) * num_kv_heads + kv_head) * GROUP + rows % GROUP
    at = heads[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    q = tl.load(query + at, mask=is_row[:, None], other=0.0)
    num_before = tl.load(seq_lens + seq) - num_new
    last_keys = num_before + tl.minimum(tokens, num_new - 1)
    table = block_tables + seq.to(tl.int64) * max_blocks
    largest = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    y = tl.zeros((QUERIES, HEAD_DIM), tl.float32)
    diagonal = (num_before + first + 1) // KEYS * KEYS  # every row sees all keys before it
    for first_key in range(0, diagonal, KEYS):
        largest, total, y = _attend(
            q, key_cache, value_cache, key_scales, value_scales, table, kv_head, num_kv_heads,
            first_key, last_keys, log2_scale, largest, total, y, HEAD_DIM, BLOCK_SIZE, IS_INT8, KEYS, False,
        )  # fmt: skip
    for first_key in range(diagonal, num_before + tl.minimum(first + TOKENS, num_new), KEYS):
        largest, total, y = _attend(
            q, key_cache, value_cache, key_scales, value_scales, table, kv_head, num_kv_heads,
            first_key, last_keys, log2_scale, largest, total, y, HEAD_DIM, BLOCK_SIZE, IS_INT8, KEYS, True,
        )  # fmt: skip
    tl.store(out + at, (y / total[:, None]).to(out.dtype.element_ty), mask=is_row[:, None])


def _supports(
    dtypes: tuple[torch.dtype, ...],
    is_int8: bool,
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
) -> bool:
    indices = (block_tables, cu_seqlens_q, seq_lens)
    are_plain = all(x.dtype is torch.int32 and x.is_contiguous() for x in indices)
    is_kind = query.dtype in dtypes and (key_cache.dtype is torch.int8) is is_int8
    has_room = query.shape[1] // key_cache.shape[2] <= FLOAT32.queries
    return is_kind and takes_cache(query, key_cache, value_cache) and are_plain and has_room and scale > 0


def _launch(
    tiles: Tiles,
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    num_tokens, num_heads, head_dim = query.shape
    block_size, num_kv_heads = key_cache.shape[1:3]
    num_seqs, group = len(seq_lens), num_heads // num_kv_heads
    out = torch.empty_like(query)
    _prefill_attention[num_packed_blocks(num_tokens, num_seqs, tiles.queries // group), num_kv_heads](
        query, *caches_and_scales(key_cache, value_cache), block_tables, cu_seqlens_q, seq_lens, out,
        num_seqs, block_tables.shape[1], scale * LOG2_E,
        HEAD_DIM=head_dim, GROUP=group, BLOCK_SIZE=block_size, IS_INT8=key_cache.dtype is torch.int8,
        QUERIES=tiles.queries, KEYS=tiles.keys, num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    return out


_in_16_bit, _in_float32 = partial(_supports, HALVES), partial(_supports, (torch.float32,))
prefill_attention.impl("triton", "cuda", partial(_in_16_bit, False))(partial(_launch, CHOSEN))
prefill_attention.impl("triton_int8", "cuda", partial(_in_16_bit, True))(partial(_launch, INT8))
for _is_int8 in (False, True):
    _name = "triton_float32_int8" if _is_int8 else "triton_float32"
    _attach = prefill_attention.impl(_name, "cuda", partial(_in_float32, _is_int8), automatic=False)
    _attach(partial(_launch, FLOAT32))
