"""PLoRA for steps of few tokens on GPUs: tiles of rows without an image end before they read a weight.

Shapes do not depend on which rows are images', so that graphs can hold it; a step of decodes costs the launches.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl


@triton.jit  # type: ignore[misc, unused-ignore]
def _product(  # type: ignore[no-untyped-def]
    y, x, weight, is_image, num_rows, out_size, in_size, y_stride, x_stride, weight_stride,
    ADD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr,  # noqa: N803
):  # fmt: skip
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    image = tl.load(is_image + rows, mask=rows < num_rows, other=0) != 0
    if tl.max(image.to(tl.int32), 0) > 0:
        columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
        inside = columns < out_size
        places = rows.to(tl.int64)
        total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
        for start in range(0, in_size, STEP):
            inner = start + tl.arange(0, STEP)
            left = tl.load(
                x + places[:, None] * x_stride + inner[None, :],
                mask=image[:, None] & (inner < in_size)[None, :], other=0.0,
            )  # fmt: skip
            right = tl.load(
                weight + columns[:, None].to(tl.int64) * weight_stride + inner[None, :],
                mask=inside[:, None] & (inner < in_size)[None, :], other=0.0,
            )  # fmt: skip
            total += tl.dot(left, tl.trans(right), input_precision="ieee")
        target = y + places[:, None] * y_stride + columns[None, :]
        wanted = image[:, None] & inside[None, :]
        if ADD:
            total += tl.load(target, mask=wanted, other=0.0).to(tl.float32)
        tl.store(target, total.to(y.dtype.element_ty), mask=wanted)


def _launch(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, is_image: torch.Tensor, add: bool) -> None:
    num_rows, (out_size, in_size) = x.shape[0], weight.shape
    rows, columns, step = 16, 64, 64
    grid: Any = (triton.cdiv(out_size, columns), triton.cdiv(num_rows, rows))
    _product[grid](
        y, x, weight, is_image, num_rows, out_size, in_size, y.stride(0), x.stride(0), weight.stride(0),
        ADD=add, ROWS=rows, COLUMNS=columns, STEP=step,
    )  # fmt: skip


def add_plora_in_tiles(
    y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: list[torch.Tensor], is_image: torch.Tensor
) -> None:
    """As `add_plora_to_images`; the last dimension of every tensor is contiguous."""
    reduced = torch.empty((x.shape[0], a.shape[0]), dtype=x.dtype, device=x.device)
    _launch(reduced, x, a, is_image, add=False)
    first = rank_first = 0
    for factor in b:
        size, rank = factor.shape
        low = reduced[:, rank_first : rank_first + rank]
        _launch(y[:, first : first + size], low, factor, is_image, add=True)
        first, rank_first = first + size, rank_first + rank
