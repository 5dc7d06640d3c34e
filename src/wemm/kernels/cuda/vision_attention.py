"""Flash attention over packed images. A head_dim of 72 is multiplied as 64 + 16, not padded to 128."""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl

from wemm.kernels.cuda.flash_attention import (
    HALVES,
    LOG2_E,
    MAX_HEAD_DIM,
    Tiles,
    find_block,
    num_packed_blocks,
    softmax_step,
)
from wemm.ops.vision_attention import vision_attention

# On capability 9.0 (Triton 3.7.1) 128 registers are enough for LARGE, so that two blocks share a multiprocessor
# and one multiplies while the other takes exponents. Where SMALL is faster was measured on an H200.
LARGE, SMALL = Tiles(128, 64, 8, 2), Tiles(64, 64, 4, 3)
SMALL_IMAGE = 1024
"""Patches: up to so many on average, SMALL is faster."""
# No tensor core computes products of float32: larger ones spill thousands of bytes of registers, these 350.
FLOAT32 = Tiles(32, 32, 8, 1)


@triton.jit
def _attend(
    query, query_rest, key, value, key_stride, value_stride, first_key, length, log2_scale,
    largest, total, y, y_rest,
    HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, KEYS: tl.constexpr, IS_LAST: tl.constexpr,
):  # fmt: skip
    """Over KEYS keys, of which the last block may have fewer."""
    keys = first_key + tl.arange(0, KEYS)
    main = tl.arange(0, MAIN)[None, :]
    rest = MAIN + tl.arange(0, REST if REST else 1)[None, :]
    key += keys.to(tl.int64)[:, None] * key_stride
    value += keys.to(tl.int64)[:, None] * value_stride
    is_key = (keys < length)[:, None]
    has_rest = rest < HEAD_DIM
    if IS_LAST:
        has_rest = has_rest & is_key
        k = tl.load(key + main, mask=is_key, other=0.0)
        v = tl.load(value + main, mask=is_key, other=0.0)
    else:
        k = tl.load(key + main)
        v = tl.load(value + main)
    scores = tl.dot(query, k.T, input_precision="ieee")
    if REST:
        k_rest = tl.load(key + rest, mask=has_rest, other=0.0)
        v_rest = tl.load(value + rest, mask=has_rest, other=0.0)
        scores = tl.dot(query_rest, k_rest.T, scores, input_precision="ieee")
    if IS_LAST:
        scores = tl.where((keys < length)[None, :], scores, float("-inf"))
    weights, shrink, largest, total = softmax_step(scores, log2_scale, largest, total)
    weights = weights.to(value.dtype.element_ty)
    y = tl.dot(weights, v, y * shrink[:, None], input_precision="ieee")
    if REST:
        y_rest = tl.dot(weights, v_rest, y_rest * shrink[:, None], input_precision="ieee")
    return largest, total, y, y_rest


@triton.jit(do_not_specialize=["num_images"])
def _vision_attention(
    query, key, value, cu_seqlens, out, num_images, log2_scale,
    query_stride, key_stride, value_stride, out_stride,
    HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A block of queries of one image and head."""
    image, first = find_block(cu_seqlens, num_images, tl.program_id(0), QUERIES)
    start = tl.load(cu_seqlens + image).to(tl.int64)
    length = (tl.load(cu_seqlens + image + 1) - start).to(tl.int32)
    if first >= length:
        return
    head = tl.program_id(1) * HEAD_DIM
    rows = first + tl.arange(0, QUERIES)
    is_row = (rows < length)[:, None]
    rows = (start + rows)[:, None]
    main = tl.arange(0, MAIN)[None, :]
    rest = MAIN + tl.arange(0, REST if REST else 1)[None, :]
    q = tl.load(query + rows * query_stride + head + main, mask=is_row, other=0.0)
    q_rest = tl.load(query + rows * query_stride + head + rest, mask=is_row & (rest < HEAD_DIM), other=0.0)
    key += start * key_stride + head
    value += start * value_stride + head
    largest = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    y = tl.zeros((QUERIES, MAIN), tl.float32)
    y_rest = tl.zeros((QUERIES, REST if REST else 1), tl.float32)
    last = length // KEYS * KEYS
    for first_key in range(0, last, KEYS):
        largest, total, y, y_rest = _attend(
            q, q_rest, key, value, key_stride, value_stride, first_key, length, log2_scale,
            largest, total, y, y_rest, HEAD_DIM, MAIN, REST, KEYS, False,
        )  # fmt: skip
    if last < length:
        largest, total, y, y_rest = _attend(
            q, q_rest, key, value, key_stride, value_stride, last, length, log2_scale,
            largest, total, y, y_rest, HEAD_DIM, MAIN, REST, KEYS, True,
        )  # fmt: skip
    out += rows * out_stride + head
    y /= total[:, None]
    tl.store(out + main, y.to(out.dtype.element_ty), mask=is_row)
    if REST:
        y_rest /= total[:, None]
        tl.store(out + rest, y_rest.to(out.dtype.element_ty), mask=is_row & (rest < HEAD_DIM))


def _supports(
    dtypes: tuple[torch.dtype, ...],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
) -> bool:
    taken = query.dtype in dtypes and all(_takes(x, query.dtype) for x in (query, key, value))
    return taken and cu_seqlens.dtype is torch.int32 and cu_seqlens.is_contiguous() and scale > 0


def _takes(x: torch.Tensor, dtype: torch.dtype) -> bool:
    head_dim = x.shape[-1]
    is_packed = x.stride(-1) == 1 and x.stride(-2) == head_dim
    is_size = head_dim % 8 == 0 and 16 <= head_dim <= MAX_HEAD_DIM
    return is_packed and is_size and x.dtype is dtype


def _split(head_dim: int) -> tuple[int, int]:
    """A power of two, and what holds the rest: 64 and 16 for 72."""
    main = 1 << (head_dim.bit_length() - 1)
    return main, triton.next_power_of_2(max(16, head_dim - main)) if head_dim > main else 0


def _launch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    num_patches, num_heads, head_dim = query.shape
    num_images = len(cu_seqlens) - 1
    tiles = SMALL if num_patches <= SMALL_IMAGE * num_images else LARGE
    tiles = FLOAT32 if query.dtype is torch.float32 else tiles
    main, rest = _split(head_dim)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    _vision_attention[num_packed_blocks(num_patches, num_images, tiles.queries), num_heads](
        query, key, value, cu_seqlens, out, num_images, scale * LOG2_E,
        query.stride(0), key.stride(0), value.stride(0), out.stride(0),
        HEAD_DIM=head_dim, MAIN=main, REST=rest, QUERIES=tiles.queries, KEYS=tiles.keys,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    return out


vision_attention.impl("triton", "cuda", partial(_supports, HALVES))(_launch)
vision_attention.impl("triton_float32", "cuda", partial(_supports, (torch.float32,)), automatic=False)(_launch)
