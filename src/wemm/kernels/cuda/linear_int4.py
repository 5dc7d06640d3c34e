"""Exact sums of the integers of each group on tensor cores, added up with their scales in float32.

As in linear_int8, the rows of the weight are those of the result. Few tokens: several groups at once, a warp for
each. Many: one group after the other, in the largest products there are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from wemm.kernels.cuda.quantized_rows import fits, quantize_rows
from wemm.kernels.cuda.silu_and_mul import gated
from wemm.kernels.cuda.tensors import FLOATS, are
from wemm.kernels.cuda.tiles import Tiles, tiles_for
from wemm.ops.linear_int4 import linear_int4
from wemm.quantization import INT4_GROUP, num_groups

# Up to 8 tokens: measured on an H200, more outputs to a program where there are enough of them. The others were
# chosen by what they hold in registers and shared memory (99 KiB on the smaller GPUs).
FEW = (Tiles(8, 16, 4 * INT4_GROUP, 4, 3), Tiles(16, 32, 4 * INT4_GROUP, 4, 4))
FEW_TO_MANY_OUTPUTS = Tiles(8, 32, 2 * INT4_GROUP, 2, 6)
MANY_OUTPUTS = 8192
MANY = (Tiles(64, 64, INT4_GROUP, 4, 4), Tiles(128, 128, INT4_GROUP, 8, 3))


@triton.jit
def _low(packed):
    """16 times the integers in the low halves of the bytes: moved up, and less 8, which flips the first bit.

    Four bytes at a time, as the compiler would take them apart.
    """
    return tl.inline_asm_elementwise(
        "{ .reg .b32 t; shl.b32 t, $1, 4; xor.b32 t, t, 0x80808080; and.b32 $0, t, 0xF0F0F0F0; }",
        "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit
def _high(packed):
    """16 times those in the high halves."""
    return tl.inline_asm_elementwise(
        "{ .reg .b32 t; xor.b32 t, $1, 0x80808080; and.b32 $0, t, 0xF0F0F0F0; }",
        "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens"])
def _few_tokens(
    x, x_scale, weight, scale, up_weight, up_scale, bias, out, num_tokens, outputs, num_groups,
    TOKENS: tl.constexpr, OUTPUTS: tl.constexpr, GROUPS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """x: [num_tokens, groups, 2, HALF], weight: [outputs, groups, HALF].

    With `up_weight`, `weight` is that of the gate: a program owns the same rows of both.
    """
    part = tl.arange(0, GROUPS)
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    token = tl.arange(0, TOKENS)
    element = tl.arange(0, HALF)
    is_output = output < outputs
    is_token = token < num_tokens
    at = output[None, :] * num_groups + part[:, None]
    in_weight = at[:, :, None] * HALF + element[None, None, :]
    scale += at
    weight += in_weight
    x += (token[None, None, :] * num_groups + part[:, None, None]) * (2 * HALF) + element[None, :, None]
    y = tl.zeros((GROUPS, OUTPUTS, TOKENS), tl.float32)
    is_in = (part < num_groups)[:, None] & is_output[None, :]
    # One step ahead, by hand: asynchronous copies, which fetch the rest ahead, are of four bytes at least.
    next_scale = tl.load(scale, mask=is_in, other=0.0)
    if up_weight is not None:
        up_scale += at
        up_weight += in_weight
        up = tl.zeros((GROUPS, OUTPUTS, TOKENS), tl.float32)
        next_up_scale = tl.load(up_scale, mask=is_in, other=0.0)
    for first in range(0, num_groups, GROUPS):
        is_group = (first + part < num_groups)[:, None]
        is_in = is_group & is_output[None, :]
        is_in_x = (is_group & is_token[None, :])[:, None, :]
        is_next = (first + GROUPS + part < num_groups)[:, None] & is_output[None, :]
        group_scale = next_scale.to(tl.float32)
        next_scale = tl.load(scale + first + GROUPS, mask=is_next, other=0.0)
        if up_weight is not None:
            up_group_scale = next_up_scale.to(tl.float32)
            next_up_scale = tl.load(up_scale + first + GROUPS, mask=is_next, other=0.0)
        packed = tl.load(weight + first * HALF, mask=is_in[:, :, None], other=0)
        low_x = tl.load(x + first * 2 * HALF, mask=is_in_x, other=0)
        high_x = tl.load(x + first * 2 * HALF + HALF, mask=is_in_x, other=0)
        sums = tl.dot(_low(packed), low_x, out_dtype=tl.int32)
        sums = tl.dot(_high(packed), high_x, sums, out_dtype=tl.int32)
        y += sums.to(tl.float32) * group_scale[:, :, None]
        if up_weight is not None:
            packed = tl.load(up_weight + first * HALF, mask=is_in[:, :, None], other=0)
            sums = tl.dot(_low(packed), low_x, out_dtype=tl.int32)
            sums = tl.dot(_high(packed), high_x, sums, out_dtype=tl.int32)
            up += sums.to(tl.float32) * up_group_scale[:, :, None]
    up_sums = tl.sum(up, 0) if up_weight is not None else None
    _finish(tl.sum(y, 0), up_sums, x_scale, bias, out, token, output, num_tokens, outputs)


@triton.jit(do_not_specialize=["num_tokens"])
def _many_tokens(
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
        sums = tl.dot(_low(packed), low_x, out_dtype=tl.int32)
        sums = tl.dot(_high(packed), high_x, sums, out_dtype=tl.int32)
        y += sums.to(tl.float32) * group_scale[:, None]
    _finish(y, None, x_scale, bias, out, token, output, num_tokens, outputs)


@triton.jit
def _finish(y, up, x_scale, bias, out, token, output, num_tokens, outputs):
    is_token = token < num_tokens
    is_output = output < outputs
    token_scale = tl.load(x_scale + token, mask=is_token, other=0.0)[None, :] * (1 / 16)
    y *= token_scale
    if bias is not None:
        y += tl.load(bias + output, mask=is_output, other=0.0).to(tl.float32)[:, None]
    y = y.to(out.dtype.element_ty)
    if up is not None:
        y = gated(y, (up * token_scale).to(y.dtype))
    at = token[None, :] * outputs + output[:, None]
    tl.store(out + at, y, mask=is_output[:, None] & is_token[None, :])


def takes(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
    """Also those of linear_int4_silu_and_mul, weight by weight."""
    stored = are(torch.uint8, weight) and are(torch.bfloat16, scale)
    return stored and x.dtype in FLOATS and are(x.dtype, x, bias) and fits(x, weight)


def product(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    tiles: Tiles,
    up_weight: torch.Tensor | None = None,
    up_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """[num_tokens, in] → [num_tokens, out]; with `up_weight`, for few tokens only, the gate of both products."""
    num_tokens, outputs = x.shape[0], weight.shape[0]
    integers, x_scale = quantize_rows(x, INT4_GROUP)
    out = torch.empty(num_tokens, outputs, dtype=x.dtype, device=x.device)
    gate = integers, x_scale, weight, scale
    rest = bias, out, num_tokens, outputs, num_groups(x.shape[1])
    shared = {"TOKENS": tiles.tokens, "OUTPUTS": tiles.outputs, "HALF": INT4_GROUP // 2}
    shared |= {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    grid = tiles.grid(num_tokens, outputs)
    if tiles not in MANY:
        _few_tokens[grid](*gate, up_weight, up_scale, *rest, GROUPS=tiles.inputs // INT4_GROUP, **shared)
    else:
        _many_tokens[grid](*gate, *rest, **shared)
    return out


@linear_int4.impl("triton", "cuda", takes)
def _(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    tiles = tiles_for(x.shape[0], (*FEW, *MANY))
    if tiles is FEW[0] and weight.shape[0] >= MANY_OUTPUTS:
        tiles = FEW_TO_MANY_OUTPUTS
    return product(x, weight, scale, bias, tiles)
