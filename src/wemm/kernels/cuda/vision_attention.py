"""Flash attention over packed images. A head_dim of 72 is multiplied as 64 + 16, not padded to 128."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl

from wemm.kernels.cuda.packed_blocks import find_block, num_packed_blocks
from wemm.ops.vision_attention import vision_attention

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_HEAD_DIM = 256
LOG2_E = math.log2(math.e)  # exp2 is what the hardware computes


@dataclass(frozen=True)
class Tiles:
    """Queries and keys multiplied at a time, and what computes them."""

    queries: int
    keys: int
    num_warps: int
    num_stages: int

    def __str__(self) -> str:
        return f"{self.queries}x{self.keys}_{self.num_warps}_{self.num_stages}"


@triton.jit
def attend(scores, values, values_rest, largest, total, out, out_rest, REST: tl.constexpr):
    """One step of the online softmax; scores in units of log 2."""
    new_largest = tl.maximum(largest, tl.max(scores, 1))
    weights = tl.exp2(scores - new_largest[:, None])
    shrink = tl.exp2(largest - new_largest)
    total = total * shrink + tl.sum(weights, 1)
    weights = weights.to(values.dtype)
    out = tl.dot(weights, values, out * shrink[:, None], input_precision="ieee")
    if REST:
        out_rest = tl.dot(weights, values_rest, out_rest * shrink[:, None], input_precision="ieee")
    return new_largest, total, out, out_rest


@triton.jit
def _vision_attention(
    query, key, value, cu_seqlens, out, num_images, log2_scale,
    query_stride, key_stride, value_stride,
    HEAD_DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    image, first = find_block(cu_seqlens, num_images, tl.program_id(0), QUERIES)
    head = tl.program_id(1)
    start = tl.load(cu_seqlens + image).to(tl.int64)
    length = tl.load(cu_seqlens + image + 1) - tl.load(cu_seqlens + image)
    if first >= length:
        return
    rows = first + tl.arange(0, QUERIES)
    columns = tl.arange(0, MAIN)
    rest = MAIN + tl.arange(0, REST if REST else 1)
    is_row = (rows < length)[:, None]
    is_rest = (rest < HEAD_DIM)[None, :]
    query += start * query_stride + head * HEAD_DIM
    key += start * key_stride + head * HEAD_DIM
    value += start * value_stride + head * HEAD_DIM
    at = rows.to(tl.int64)[:, None] * query_stride
    q = tl.load(query + at + columns[None, :], mask=is_row, other=0.0)
    if REST:
        q_rest = tl.load(query + at + rest[None, :], mask=is_row & is_rest, other=0.0)
    largest = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    y = tl.zeros((QUERIES, MAIN), tl.float32)
    y_rest = tl.zeros((QUERIES, REST if REST else 1), tl.float32)
    for first_key in range(0, length, KEYS):
        keys = first_key + tl.arange(0, KEYS)
        is_key = keys < length
        key_at = keys.to(tl.int64)[:, None] * key_stride
        value_at = keys.to(tl.int64)[:, None] * value_stride
        k = tl.load(key + key_at + columns[None, :], mask=is_key[:, None], other=0.0)
        scores = tl.dot(q, k.T, input_precision="ieee")
        v = tl.load(value + value_at + columns[None, :], mask=is_key[:, None], other=0.0)
        v_rest = v
        if REST:
            mask = is_key[:, None] & is_rest
            k_rest = tl.load(key + key_at + rest[None, :], mask=mask, other=0.0)
            scores = tl.dot(q_rest, k_rest.T, scores, input_precision="ieee")
            v_rest = tl.load(value + value_at + rest[None, :], mask=mask, other=0.0)
        scores = tl.where(is_key[None, :], scores * log2_scale, float("-inf"))
        largest, total, y, y_rest = attend(scores, v, v_rest, largest, total, y, y_rest, REST)
    out += (start + rows)[:, None] * (tl.num_programs(1) * HEAD_DIM) + head * HEAD_DIM
    y /= total[:, None]
    tl.store(out + columns[None, :], y.to(out.dtype.element_ty), mask=is_row)
    if REST:
        y_rest /= total[:, None]
        tl.store(out + rest[None, :], y_rest.to(out.dtype.element_ty), mask=is_row & is_rest)


def _supports(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor, scale: float
) -> bool:
    return (
        scale > 0 and cu_seqlens.dtype is torch.int32 and all(takes(x, query.dtype) for x in (query, key, value))
    )


def takes(x: torch.Tensor, dtype: torch.dtype) -> bool:
    """Dtype, layout and head_dim of queries, keys or values: heads side by side, rows anywhere."""
    head_dim = x.shape[-1]
    is_packed = x.stride(-1) == 1 and x.stride(-2) == head_dim
    return (
        is_packed and x.dtype is dtype and dtype in DTYPES and head_dim % 8 == 0 and 16 <= head_dim <= MAX_HEAD_DIM
    )


def split_head_dim(head_dim: int) -> tuple[int, int]:
    """A power of two, and what holds the rest: 64 + 16 for 72."""
    main = 1 << (head_dim.bit_length() - 1)
    return main, triton.next_power_of_2(max(16, head_dim - main)) if head_dim > main else 0


def _launch(
    tiles: Tiles,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    num_patches, num_heads, head_dim = query.shape
    num_images = len(cu_seqlens) - 1
    main, rest = split_head_dim(head_dim)
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    _vision_attention[num_packed_blocks(num_patches, num_images, tiles.queries), num_heads](
        query, key, value, cu_seqlens, out, num_images, scale * LOG2_E,
        query.stride(0), key.stride(0), value.stride(0),
        HEAD_DIM=head_dim, MAIN=main, REST=rest, QUERIES=tiles.queries, KEYS=tiles.keys,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    return out


# The first is chosen; the others are there to be measured beside it on a GPU, which none has been yet.
CANDIDATES = (Tiles(128, 64, 8, 3), Tiles(128, 128, 8, 2), Tiles(64, 64, 4, 3))
for _tiles in CANDIDATES:
    _name = "triton" if _tiles is CANDIDATES[0] else f"triton_{_tiles}"
    vision_attention.impl(_name, "cuda", _supports, automatic=_tiles is CANDIDATES[0])(partial(_launch, _tiles))
