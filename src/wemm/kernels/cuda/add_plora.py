"""Two products: rows are gathered while the first reads them, and the second adds where it writes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from wemm.kernels.cuda.tensors import FLOATS, are
from wemm.kernels.cuda.tiles import Tiles, tiles_for
from wemm.ops.add_plora import add_plora

# A rank of 512 is 8 blocks: with 64 rows each, an image of 947 tokens is 120 programs. Unmeasured.
LOW_TILES = (Tiles(16, 32, 64, 4, 4), Tiles(64, 64, 64, 4, 4))
UPDATE_TILES = (Tiles(16, 64, 64, 4, 4), Tiles(128, 128, 64, 8, 3))
FLOAT32_TILES = (Tiles(32, 32, 32, 4, 2),)

Update = tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]
"""y, A, B and the scaling of one linear."""


@triton.jit(do_not_specialize=["num_rows"])
def _low_rank(
    x, plora_a, other_a, image_rows, low, scaling, other_scaling, num_rows, width, rank,
    ROWS: tl.constexpr, RANK: tl.constexpr, INPUTS: tl.constexpr,
):  # fmt: skip
    """low: [members, num_rows, rank]; with `other_a` there are two of them."""
    if other_a is not None and tl.program_id(2) == 1:
        plora_a = other_a
        scaling = other_scaling
        low += num_rows * rank
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1) * RANK + tl.arange(0, RANK)
    column = tl.arange(0, INPUTS)
    is_row = row < num_rows
    is_part = part < rank
    gathered = tl.load(image_rows + row, mask=is_row, other=0)
    x += gathered[:, None] * width + column[None, :]
    plora_a += part[None, :] * width + column[:, None]
    sums = tl.zeros((ROWS, RANK), tl.float32)
    for first in range(0, width, INPUTS):
        is_column = first + column < width
        values = tl.load(x + first, mask=is_row[:, None] & is_column[None, :], other=0.0)
        a = tl.load(plora_a + first, mask=is_column[:, None] & is_part[None, :], other=0.0)
        sums = tl.dot(values, a, sums, input_precision="ieee")
    # Rounded as the definition rounds: the product, then what it is scaled to.
    scaled = sums.to(low.dtype.element_ty).to(tl.float32) * scaling
    at = row[:, None] * rank + part[None, :]
    tl.store(low + at, scaled.to(low.dtype.element_ty), mask=is_row[:, None] & is_part[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def _add_update(
    y, other_y, low, plora_b, other_b, image_rows, num_rows, outputs, rank,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, RANK: tl.constexpr,
):  # fmt: skip
    """As _low_rank."""
    if other_y is not None and tl.program_id(2) == 1:
        y = other_y
        plora_b = other_b
        low += num_rows * rank
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    part = tl.arange(0, RANK)
    is_row = row < num_rows
    is_output = output < outputs
    low += row[:, None] * rank + part[None, :]
    plora_b += output[None, :] * rank + part[:, None]
    update = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for first in range(0, rank, RANK):
        is_part = first + part < rank
        values = tl.load(low + first, mask=is_row[:, None] & is_part[None, :], other=0.0)
        b = tl.load(plora_b + first, mask=is_part[:, None] & is_output[None, :], other=0.0)
        update = tl.dot(values, b, update, input_precision="ieee")
    scattered = tl.load(image_rows + row, mask=is_row, other=0)
    y += scattered[:, None] * outputs + output[None, :]
    is_in = is_row[:, None] & is_output[None, :]
    before = tl.load(y, mask=is_in, other=0.0).to(tl.float32)
    tl.store(y, (before + update).to(y.dtype.element_ty), mask=is_in)


def takes(
    y: torch.Tensor,
    x: torch.Tensor,
    plora_a: torch.Tensor,
    plora_b: torch.Tensor,
    scaling: float,
    image_rows: torch.Tensor,
) -> bool:
    """Also those of add_plora_pair, one after the other."""
    return y.dtype in FLOATS and are(y.dtype, y, x, plora_a, plora_b) and are(torch.int64, image_rows)


@add_plora.impl("triton", "cuda", takes)
def _(
    y: torch.Tensor,
    x: torch.Tensor,
    plora_a: torch.Tensor,
    plora_b: torch.Tensor,
    scaling: float,
    image_rows: torch.Tensor,
) -> torch.Tensor:
    add_updates(x, image_rows, (y, plora_a, plora_b, scaling))
    return y


def add_updates(x: torch.Tensor, image_rows: torch.Tensor, one: Update, other: Update | None = None) -> None:
    """To one result, or in the same two launches to two of the same sizes."""
    y, plora_a, plora_b, scaling = one
    other_y, other_a, other_b, other_scaling = other or (None,) * 4
    num_rows, (rank, width), outputs = len(image_rows), plora_a.shape, y.shape[1]
    members = 1 if other is None else 2
    is_wide = x.dtype is torch.float32
    low = torch.empty(members, num_rows, rank, dtype=x.dtype, device=x.device)
    tiles = tiles_for(num_rows, FLOAT32_TILES if is_wide else LOW_TILES)
    _low_rank[(*tiles.grid(num_rows, rank), members)](
        x, plora_a, other_a, image_rows, low, scaling, other_scaling, num_rows, width, rank,
        ROWS=tiles.tokens, RANK=tiles.outputs, INPUTS=tiles.inputs,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    tiles = tiles_for(num_rows, FLOAT32_TILES if is_wide else UPDATE_TILES)
    _add_update[(*tiles.grid(num_rows, outputs), members)](
        y, other_y, low, plora_b, other_b, image_rows, num_rows, outputs, rank,
        ROWS=tiles.tokens, OUTPUTS=tiles.outputs, RANK=tiles.inputs,
        num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
