"""Exact sums of integers, on tensor cores for every number of tokens: a few tokens fill up their block with zeros.

The rows of the weight are those of the tensor cores' result, tokens its columns, of which 8 are enough.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from wemm.kernels.cuda.quantized_rows import fits, quantize_rows
from wemm.kernels.cuda.silu_and_mul import gated
from wemm.kernels.cuda.tensors import FLOATS, are
from wemm.kernels.cuda.tiles import Tiles, tiles_for
from wemm.ops.linear_int8 import linear_int8

# Chosen by what they hold in registers and shared memory (99 KiB on the smaller GPUs).
TILES = (Tiles(8, 16, 256, 2, 6), Tiles(16, 32, 256, 4, 5), Tiles(64, 64, 128, 4, 4), Tiles(128, 128, 128, 8, 3))


@triton.jit(do_not_specialize=["num_tokens"])
def _linear_int8(
    x, x_scale, weight, scale, up_weight, up_scale, bias, out, num_tokens, outputs, width,
    GELU: tl.constexpr, TOKENS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """With `up_weight`, `weight` is that of the gate: a program owns the same rows of both."""
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    column = tl.arange(0, INPUTS)
    is_token = token < num_tokens
    is_output = output < outputs
    x += token[None, :] * width + column[:, None]
    in_weight = output[:, None] * width + column[None, :]
    weight += in_weight
    sums = tl.zeros((OUTPUTS, TOKENS), tl.int32)
    if up_weight is not None:
        up_weight += in_weight
        up_sums = tl.zeros((OUTPUTS, TOKENS), tl.int32)
    for first in range(0, width, INPUTS):
        is_column = first + column < width
        w = tl.load(weight + first, mask=is_output[:, None] & is_column[None, :], other=0)
        a = tl.load(x + first, mask=is_column[:, None] & is_token[None, :], other=0)
        sums = tl.dot(w, a, sums, out_dtype=tl.int32)
        if up_weight is not None:
            w = tl.load(up_weight + first, mask=is_output[:, None] & is_column[None, :], other=0)
            up_sums = tl.dot(w, a, up_sums, out_dtype=tl.int32)
    token_scale = tl.load(x_scale + token, mask=is_token, other=0.0)[None, :]
    y = sums.to(tl.float32) * token_scale
    y *= tl.load(scale + output, mask=is_output, other=0.0)[:, None]
    if bias is not None:
        y += tl.load(bias + output, mask=is_output, other=0.0).to(tl.float32)[:, None]
    y = y.to(out.dtype.element_ty)
    if GELU:
        wide = y.to(tl.float32)
        # tanh(u) = 2 sigmoid(2 u) - 1, and 2 sqrt(2 / pi) = 1.5957691
        y = (wide / (1 + tl.exp(-1.5957691216057308 * (wide + 0.044715 * wide * wide * wide)))).to(y.dtype)
    if up_weight is not None:
        up = up_sums.to(tl.float32) * token_scale
        up *= tl.load(up_scale + output, mask=is_output, other=0.0)[:, None]
        y = gated(y, up.to(y.dtype))
    tl.store(out + token[None, :] * outputs + output[:, None], y, mask=is_output[:, None] & is_token[None, :])


def takes(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
    """Also those of linear_int8_gelu and, weight by weight, of linear_int8_silu_and_mul."""
    stored = are(torch.int8, weight) and are(torch.float32, scale)
    return stored and x.dtype in FLOATS and are(x.dtype, x, bias) and fits(x, weight)


def product(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    gelu: bool = False,
    choices: Sequence[Tiles] = TILES,
    up_weight: torch.Tensor | None = None,
    up_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """[num_tokens, in] → [num_tokens, out], activated or not; with `up_weight` the gate of both products."""
    (num_tokens, width), outputs = x.shape, weight.shape[0]
    tiles = tiles_for(num_tokens, choices)
    integers, x_scale = quantize_rows(x)
    out = torch.empty(num_tokens, outputs, dtype=x.dtype, device=x.device)
    _linear_int8[tiles.grid(num_tokens, outputs)](
        integers, x_scale, weight, scale, up_weight, up_scale, bias, out, num_tokens, outputs, width,
        GELU=gelu, TOKENS=tiles.tokens, OUTPUTS=tiles.outputs, INPUTS=tiles.inputs,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    return out


@linear_int8.impl("triton", "cuda", takes)
def _(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    return product(x, weight, scale, bias)
