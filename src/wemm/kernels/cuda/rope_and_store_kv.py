"""One pass over the packed projection; keys and values go straight into the cache, as int8 if it is."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from wemm.kernels.cuda.quantized_rows import int8_scale, magnitude, round_to_int8
from wemm.kernels.cuda.tensors import FLOATS, are
from wemm.ops.rope_and_store_kv import rope_and_store_kv


@triton.jit
def _rope_and_store_kv(
    qkv, cos, sin, key_cache, value_cache, slot_mapping, query,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, STORED_DIM: tl.constexpr,
    HEADS_BLOCK: tl.constexpr, PAIRS_BLOCK: tl.constexpr,
):  # fmt: skip
    """A token and one KV head, its query heads included."""
    PAIRS: tl.constexpr = HEAD_DIM // 2
    token = tl.program_id(0).to(tl.int64)
    pairs = tl.arange(0, PAIRS_BLOCK)
    is_pair = pairs < PAIRS
    c = tl.load(cos + token * PAIRS + pairs, mask=is_pair, other=0.0)
    s = tl.load(sin + token * PAIRS + pairs, mask=is_pair, other=0.0)
    row = token * tl.num_programs(1) + tl.program_id(1)
    qkv += row * (GROUP + 2) * HEAD_DIM

    heads = tl.arange(0, HEADS_BLOCK)
    at = heads[:, None] * HEAD_DIM + pairs[None, :]
    is_query = (heads < GROUP)[:, None] & is_pair[None, :]
    first = tl.load(qkv + at, mask=is_query, other=0.0).to(tl.float32)
    second = tl.load(qkv + at + PAIRS, mask=is_query, other=0.0).to(tl.float32)
    query += row * GROUP * HEAD_DIM
    rotated = first * c[None, :] - second * s[None, :]
    tl.store(query + at, rotated.to(query.dtype.element_ty), mask=is_query)
    rotated = second * c[None, :] + first * s[None, :]
    tl.store(query + at + PAIRS, rotated.to(query.dtype.element_ty), mask=is_query)

    stored = (tl.load(slot_mapping + token) * tl.num_programs(1) + tl.program_id(1)) * STORED_DIM
    qkv += GROUP * HEAD_DIM
    first = tl.load(qkv + pairs, mask=is_pair, other=0.0).to(tl.float32)
    second = tl.load(qkv + pairs + PAIRS, mask=is_pair, other=0.0).to(tl.float32)
    _store(key_cache + stored, first * c - second * s, second * c + first * s, pairs, is_pair, PAIRS)
    first = tl.load(qkv + HEAD_DIM + pairs, mask=is_pair, other=0.0).to(tl.float32)
    second = tl.load(qkv + HEAD_DIM + pairs + PAIRS, mask=is_pair, other=0.0).to(tl.float32)
    _store(value_cache + stored, first, second, pairs, is_pair, PAIRS)


@triton.jit
def _store(cache, first, second, pairs, is_pair, PAIRS: tl.constexpr):
    if cache.dtype.element_ty == tl.int8:
        largest = tl.maximum(tl.max(magnitude(first), 0), tl.max(magnitude(second), 0))
        scale, inverse = int8_scale(largest)
        first = round_to_int8(first, inverse)
        second = round_to_int8(second, inverse)
        # Bytes, as a head_dim need not be a multiple of four.
        index = tl.arange(0, 4)
        bits = scale.to(tl.int32, bitcast=True)
        tl.store(cache + 2 * PAIRS + index, (bits >> 8 * index).to(tl.int8))
    tl.store(cache + pairs, first.to(cache.dtype.element_ty), mask=is_pair)
    tl.store(cache + PAIRS + pairs, second.to(cache.dtype.element_ty), mask=is_pair)


def _supports(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> bool:
    stored = torch.int8 if key_cache.dtype is torch.int8 else qkv.dtype
    caches = are(stored, key_cache, value_cache)
    others = are(torch.float32, cos, sin) and are(torch.int64, slot_mapping)
    return caches and others and qkv.dtype in FLOATS and are(qkv.dtype, qkv)


@rope_and_store_kv.impl("triton", "cuda", _supports)
def _(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    num_tokens, num_kv_heads, packed, head_dim = qkv.shape
    group = packed - 2
    query = torch.empty(num_tokens, num_kv_heads * group, head_dim, dtype=qkv.dtype, device=qkv.device)
    _rope_and_store_kv[num_tokens, num_kv_heads](
        qkv, cos, sin, key_cache, value_cache, slot_mapping, query,
        GROUP=group, HEAD_DIM=head_dim, STORED_DIM=key_cache.shape[-1],
        HEADS_BLOCK=triton.next_power_of_2(group), PAIRS_BLOCK=triton.next_power_of_2(head_dim // 2),
        num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
    return query, key_cache, value_cache
