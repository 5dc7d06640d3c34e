"""Exact sums of the integers of each group, added up with their scales in float32.

A few tokens: words of eight weights, each half of which is a product of four bytes (dp4a). Many: tensor cores.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from wemm.kernels.cuda.quantized_rows import quantize_rows
from wemm.kernels.cuda.tensors import FLOATS, MAX_ROW, are
from wemm.kernels.cuda.tiles import Tiles, tiles_for
from wemm.ops.linear_int4 import linear_int4
from wemm.quantization import INT4_GROUP, num_groups

MAX_WORD_TOKENS = 4
"""Up to here words: beyond, their instructions take longer than memory. An estimate, unmeasured."""
# One warp a program: a thread loads four times 16 bytes of the weight at once, and nobody waits at a barrier.
ROWS, GROUPS = 2, 16
TILES = (Tiles(16, 16, INT4_GROUP, 1, 5), Tiles(64, 64, INT4_GROUP, 4, 4), Tiles(128, 128, INT4_GROUP, 8, 3))


@triton.jit
def dot4(a, b, c):
    """c + the product of four signed bytes."""
    return tl.inline_asm_elementwise(
        "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _words(
    x, x_scale, weight, scale, bias, out, outputs, num_groups,
    NUM_TOKENS: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """x: [num_tokens, groups, 2, WORDS], weight: [outputs, groups, WORDS], both four bytes to a word."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.arange(0, TOKENS)
    word = tl.arange(0, WORDS)[None, None, None, :]
    is_row = row < outputs
    is_token = token < NUM_TOKENS
    y = tl.zeros((ROWS, TOKENS, GROUPS), tl.float32)
    for first in range(0, num_groups, GROUPS):
        group = first + tl.arange(0, GROUPS)
        is_group = group < num_groups
        at = (row[:, None] * num_groups + group[None, :])[:, None, :]
        is_in = (is_row[:, None] & is_group[None, :])[:, None, :]
        packed = tl.load(weight + at[:, :, :, None] * WORDS + word, mask=is_in[:, :, :, None], other=0)
        group_scale = tl.load(scale + at, mask=is_in, other=0.0).to(tl.float32)
        x_at = (token[:, None] * num_groups + group[None, :])[None, :, :, None] * (2 * WORDS) + word
        is_in_x = (is_token[:, None] & is_group[None, :])[None, :, :, None]
        low_x = tl.load(x + x_at, mask=is_in_x, other=0)
        high_x = tl.load(x + x_at + WORDS, mask=is_in_x, other=0)
        # Less 8 is the first bit of a half flipped. In the upper half of a byte it is 16 times the integer.
        signed = packed ^ -0x77777778  # 0x88888888
        low = (signed << 4) & -0x0F0F0F10  # 0xF0F0F0F0
        high = signed & -0x0F0F0F10
        sums = tl.sum(dot4(high, high_x, dot4(low, low_x, 0)), 3)
        y += sums.to(tl.float32) * group_scale
    total = tl.sum(y, 2) * (1 / 16) * tl.load(x_scale + token, mask=is_token, other=0.0)[None, :]
    if bias is not None:
        total += tl.load(bias + row, mask=is_row, other=0.0).to(tl.float32)[:, None]
    at = token[None, :] * outputs + row[:, None]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=is_row[:, None] & is_token[None, :])


@triton.jit(do_not_specialize=["num_tokens"])
def _tiles(
    x, x_scale, weight, scale, bias, out, num_tokens, outputs, num_groups,
    TOKENS: tl.constexpr, OUTPUTS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """x: [num_tokens, groups, 2, HALF], weight: [outputs, groups, HALF]."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    element = tl.arange(0, HALF)
    is_token = token < num_tokens
    is_output = output < outputs
    x += token[None, :] * (num_groups * 2 * HALF) + element[:, None]
    weight += output[:, None] * (num_groups * HALF) + element[None, :]
    scale += output * num_groups
    y = tl.zeros((OUTPUTS, TOKENS), tl.float32)
    for group in range(num_groups):
        group_scale = tl.load(scale + group, mask=is_output, other=0.0).to(tl.float32)
        packed = tl.load(weight + group * HALF, mask=is_output[:, None], other=0)
        low_x = tl.load(x + group * 2 * HALF, mask=is_token[None, :], other=0)
        high_x = tl.load(x + group * 2 * HALF + HALF, mask=is_token[None, :], other=0)
        low = ((packed << 4) ^ 0x80).to(tl.int8, bitcast=True)
        high = ((packed & 0xF0) ^ 0x80).to(tl.int8, bitcast=True)
        sums = tl.dot(high, high_x, tl.dot(low, low_x, out_dtype=tl.int32), out_dtype=tl.int32)
        y += sums.to(tl.float32) * group_scale[:, None]
    y *= (1 / 16) * tl.load(x_scale + token, mask=is_token, other=0.0)[None, :]
    if bias is not None:
        y += tl.load(bias + output, mask=is_output, other=0.0).to(tl.float32)[:, None]
    at = token[None, :] * outputs + output[:, None]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=is_output[:, None] & is_token[None, :])


def _supports(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> bool:
    is_small = x.shape[1] <= MAX_ROW and max(x.numel(), weight.numel(), x.shape[0] * weight.shape[0]) < 2**31
    stored = are(torch.uint8, weight) and are(torch.bfloat16, scale)
    return stored and x.dim() == 2 and is_small and x.dtype in FLOATS and are(x.dtype, x, bias)


@linear_int4.impl("triton", "cuda", _supports)
def _(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    num_tokens, outputs, groups = x.shape[0], weight.shape[0], num_groups(x.shape[1])
    out = torch.empty(num_tokens, outputs, dtype=x.dtype, device=x.device)
    if num_tokens == 0:
        return out
    integers, x_scale = quantize_rows(x, INT4_GROUP)
    half = INT4_GROUP // 2
    if num_tokens <= MAX_WORD_TOKENS:
        words = integers.view(torch.int32), x_scale, weight.view(torch.int32)
        _words[(triton.cdiv(outputs, ROWS),)](
            *words, scale, bias, out, outputs, groups,
            NUM_TOKENS=num_tokens, TOKENS=triton.next_power_of_2(num_tokens),
            ROWS=ROWS, GROUPS=GROUPS, WORDS=half // 4, num_warps=1,
        )  # fmt: skip
        return out
    tiles = tiles_for(num_tokens, TILES)
    _tiles[tiles.grid(num_tokens, outputs)](
        integers, x_scale, weight, scale, bias, out, num_tokens, outputs, groups,
        TOKENS=tiles.tokens, OUTPUTS=tiles.outputs, HALF=half,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    return out
