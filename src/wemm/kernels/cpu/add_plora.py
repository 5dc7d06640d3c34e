"""Rows of an image lie one behind the other: they are read where they are, and the update is added there."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch

from wemm.kernels.cpu.linear import HAS_PRODUCT
from wemm.ops.add_plora import add_plora
from wemm.ops.linear import linear

MIN_RUN = 32
"""Rows of a run, on average, from which a product of its own is worth it: shorter ones are gathered."""


def _supports(
    y: torch.Tensor,
    x: torch.Tensor,
    plora_a: torch.Tensor,
    plora_b: torch.Tensor,
    scaling: float,
    image_rows: torch.Tensor,
) -> bool:
    tensors = (y, x, plora_a, plora_b)
    return all(t.dtype == y.dtype and t.is_contiguous() for t in tensors)


@add_plora.impl("in_place", device="cpu", supports=_supports)
def _(
    y: torch.Tensor,
    x: torch.Tensor,
    plora_a: torch.Tensor,
    plora_b: torch.Tensor,
    scaling: float,
    image_rows: torch.Tensor,
) -> torch.Tensor:
    if len(image_rows) == 0:
        return y
    bounds = _bounds(image_rows)
    if (len(bounds) - 1) * MIN_RUN > len(image_rows):
        update = linear(linear(x[image_rows], plora_a).mul_(scaling), plora_b)
        return y.index_add_(0, image_rows, update)
    for rows in _slices(image_rows, bounds):
        low = linear(x[rows], plora_a).mul_(scaling)
        if HAS_PRODUCT.get(y.dtype, True):
            y[rows].addmm_(low, plora_b.T)
        else:  # addmm would be torch's own product of 16 bit, which the op linear knows to avoid
            y[rows] += linear(low, plora_b)
    return y


def _bounds(image_rows: torch.Tensor) -> list[int]:
    """Where runs of consecutive rows begin, and the end of the last."""
    breaks = (image_rows.diff() != 1).nonzero().flatten() + 1
    return [0, *breaks.tolist(), len(image_rows)]


def _slices(image_rows: torch.Tensor, bounds: list[int]) -> Iterator[slice]:
    for begin, end in pairwise(bounds):
        first = int(image_rows[begin])
        yield slice(first, first + end - begin)
