"""A few tokens: both weights are read once and in one launch, and the products are never in memory."""

from __future__ import annotations

import torch

from wemm.kernels.cuda.linear import product, takes
from wemm.kernels.cuda.tiles import Tiles
from wemm.ops.linear_silu_and_mul import linear_silu_and_mul

# As much in flight on a multiprocessor as with the tiles of linear: fewer stages, of two weights each. Unmeasured.
TILES = Tiles(8, 16, 128, 2, 4)


def _supports(x: torch.Tensor, gate_weight: torch.Tensor, up_weight: torch.Tensor) -> bool:
    return gate_weight.shape == up_weight.shape and takes(x, gate_weight) and takes(x, up_weight)


@linear_silu_and_mul.impl("triton", "cuda", _supports)
def _(x: torch.Tensor, gate_weight: torch.Tensor, up_weight: torch.Tensor) -> torch.Tensor:
    return product(x, gate_weight, None, TILES, up_weight)
