"""A few tokens: rounded once, then both weights in one launch."""

from __future__ import annotations

import torch

from wemm.kernels.cuda.linear_int4 import product, takes
from wemm.kernels.cuda.tiles import Tiles, tiles_for
from wemm.ops.linear_int4_silu_and_mul import linear_int4_silu_and_mul
from wemm.quantization import INT4_GROUP

# Of both weights together what a program of linear_int4 holds of one. Unmeasured.
TILES = (Tiles(8, 16, 2 * INT4_GROUP, 2, 6), Tiles(16, 16, 4 * INT4_GROUP, 4, 4))


def _supports(
    x: torch.Tensor,
    gate_weight: torch.Tensor,
    gate_scale: torch.Tensor,
    up_weight: torch.Tensor,
    up_scale: torch.Tensor,
) -> bool:
    is_few = x.shape[0] <= TILES[-1].tokens and gate_weight.shape == up_weight.shape
    return is_few and takes(x, gate_weight, gate_scale) and takes(x, up_weight, up_scale)


@linear_int4_silu_and_mul.impl("triton", "cuda", _supports)
def _(
    x: torch.Tensor,
    gate_weight: torch.Tensor,
    gate_scale: torch.Tensor,
    up_weight: torch.Tensor,
    up_scale: torch.Tensor,
) -> torch.Tensor:
    tiles = tiles_for(x.shape[0], TILES)
    return product(x, gate_weight, gate_scale, None, tiles, up_weight, up_scale)
