"""The product without its bias, into memory that is at hand; bias and activation in one pass over it.

oneDNN can apply them to its sums, but only into fresh memory, which costs more than the pass.
"""

from __future__ import annotations

import torch

from wemm.kernels.cpu import _kernels
from wemm.kernels.cpu.tensors import DTYPE_CODES, as_argument
from wemm.ops.linear import linear
from wemm.ops.linear_gelu import linear_gelu


def _supports(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> bool:
    return x.dtype in DTYPE_CODES and bias.dtype == x.dtype and x.dim() == 2 and bias.is_contiguous()


@linear_gelu.impl("cpp", device="cpu", supports=_supports)
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    y = linear(x, weight)
    _kernels.add_bias_gelu(as_argument(y), as_argument(bias))
    return y
