"""Pixels are bytes until they are multiplied: a program normalises those of its patches in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from wemm.kernels.cuda.tensors import FLOATS, are
from wemm.kernels.cuda.tiles import Tiles
from wemm.ops.embed_patches import embed_patches

# Two programs at least share a multiprocessor: while one normalises, another multiplies. Unmeasured.
TILES = Tiles(64, 128, 32, 4, 4)
FLOAT32_TILES = Tiles(32, 32, 32, 4, 2)


@triton.jit(do_not_specialize=["num_patches"])
def _embed_patches(
    patches, extents, weight, bias, out, num_patches, outputs,
    PATCH_SIZE: tl.constexpr, PATCHES: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    # A constant, so that rows of 588 are known to begin at multiples of 4: loads are of 4 numbers instead of one.
    WIDTH: tl.constexpr = 3 * PATCH_SIZE * PATCH_SIZE
    patch = tl.program_id(0) * PATCHES + tl.arange(0, PATCHES)
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    column = tl.arange(0, INPUTS)
    is_patch = patch < num_patches
    is_output = output < outputs
    rows = tl.load(extents + 2 * patch, mask=is_patch, other=0)
    columns = tl.load(extents + 2 * patch + 1, mask=is_patch, other=0)
    patches += patch[:, None] * WIDTH + column[None, :]
    weight += output[None, :] * WIDTH + column[:, None]
    sums = tl.zeros((PATCHES, OUTPUTS), tl.float32)
    for first in range(0, WIDTH, INPUTS):
        at = first + column
        is_column = at < WIDTH
        samples = tl.load(patches + first, mask=is_patch[:, None] & is_column[None, :], other=0)
        w = tl.load(weight + first, mask=is_column[:, None] & is_output[None, :], other=0.0)
        # float32(1 / 255), and twice is divided by a half: as the definition rounds, if nothing is fused.
        values = (samples.to(tl.float32) * 0.003921568859368563 - 0.5) * 2.0
        in_row = at % PATCH_SIZE
        in_column = at // PATCH_SIZE % PATCH_SIZE
        is_inside = (in_column[None, :] < rows[:, None]) & (in_row[None, :] < columns[:, None])
        values = tl.where(is_inside, values, 0.0)
        sums = tl.dot(values.to(w.dtype), w, sums, input_precision="ieee")
    y = sums + tl.load(bias + output, mask=is_output, other=0.0).to(tl.float32)[None, :]
    out += patch[:, None] * outputs + output[None, :]
    tl.store(out, y.to(out.dtype.element_ty), mask=is_patch[:, None] & is_output[None, :])


def _supports(patches: torch.Tensor, extents: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> bool:
    # Offsets are of 32 bits.
    sizes = patches.numel(), weight.numel(), patches.shape[0] * weight.shape[0]
    is_sent = are(torch.uint8, patches) and are(torch.int32, extents) and max(sizes) < 2**31
    return is_sent and weight.dtype in FLOATS and are(weight.dtype, weight, bias)


@embed_patches.impl("triton", "cuda", _supports)
def _(patches: torch.Tensor, extents: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    num_patches, outputs = patches.shape[0], weight.shape[0]
    out = torch.empty(num_patches, outputs, dtype=weight.dtype, device=patches.device)
    tiles = FLOAT32_TILES if weight.dtype is torch.float32 else TILES
    _embed_patches[tiles.grid(num_patches, outputs)](
        patches, extents, weight, bias, out, num_patches, outputs,
        PATCH_SIZE=weight.shape[-1], PATCHES=tiles.tokens, OUTPUTS=tiles.outputs, INPUTS=tiles.inputs,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages, enable_fp_fusion=False,
    )  # fmt: skip
    return out
