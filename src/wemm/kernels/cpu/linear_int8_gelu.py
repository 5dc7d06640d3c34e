"""linear_int8 with its activation applied to the sums: the wide result is written once."""

from __future__ import annotations

import torch

from wemm.kernels.cpu import _kernels
from wemm.kernels.cpu.linear_int8 import takes
from wemm.kernels.cpu.result_memory import empty
from wemm.kernels.cpu.tensors import as_argument
from wemm.ops.linear_int8_gelu import linear_int8_gelu


@linear_int8_gelu.impl("cpp", device="cpu", supports=takes)
def _(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    out = empty((x.shape[0], weight.shape[0]), x.dtype)
    given = as_argument(x), as_argument(weight), as_argument(scale), as_argument(bias)
    _kernels.linear_int8_gelu(*given, as_argument(out))
    return out
