"""A few tokens: rounded once, then both weights in one launch."""

from __future__ import annotations

import torch

from wemm.kernels.cuda.linear_int8 import product, takes
from wemm.kernels.cuda.tiles import Tiles
from wemm.ops.linear_int8_silu_and_mul import linear_int8_silu_and_mul

# As much in flight as with the tiles of linear_int8, of both weights. Unmeasured.
TILES = (Tiles(8, 16, 256, 2, 4), Tiles(16, 16, 256, 2, 5))


def _supports(
    x: torch.Tensor,
    gate_weight: torch.Tensor,
    gate_scale: torch.Tensor,
    up_weight: torch.Tensor,
    up_scale: torch.Tensor,
) -> bool:
    is_few = x.shape[0] <= TILES[-1].tokens and gate_weight.shape == up_weight.shape
    return is_few and takes(x, gate_weight, gate_scale) and takes(x, up_weight, up_scale)


@linear_int8_silu_and_mul.impl("triton", "cuda", _supports)
def _(
    x: torch.Tensor,
    gate_weight: torch.Tensor,
    gate_scale: torch.Tensor,
    up_weight: torch.Tensor,
    up_scale: torch.Tensor,
) -> torch.Tensor:
    return product(x, gate_weight, gate_scale, None, choices=TILES, up_weight=up_weight, up_scale=up_scale)
