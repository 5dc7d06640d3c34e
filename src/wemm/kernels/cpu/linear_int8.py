"""Exact sums of integers: a few tokens at the speed of memory, many on matrix tiles or AVX-512 VNNI."""

from __future__ import annotations

import torch

from wemm.kernels.cpu import _kernels
from wemm.kernels.cpu.result_memory import empty
from wemm.kernels.cpu.tensors import DTYPE_CODES, as_argument
from wemm.ops.linear_int8 import linear_int8

MAX_GEMV_TOKENS = 8
"""csrc/linear_int8.h: kMaxInt8GemvTokens."""


def takes(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
    """Also those of linear_int8_gelu."""
    tensors = [x, weight, scale] if bias is None else [x, weight, scale, bias]
    fits = x.dim() == 2 and (x.shape[0] <= MAX_GEMV_TOKENS or _kernels.has_avx512_vnni())
    dtypes = x.dtype in DTYPE_CODES and (bias is None or bias.dtype == x.dtype)
    return fits and dtypes and all(t.is_contiguous() for t in tensors)


@linear_int8.impl("cpp", device="cpu", supports=takes)
def _(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    out = empty((x.shape[0], weight.shape[0]), x.dtype)
    offset = None if bias is None else as_argument(bias)
    _kernels.linear_int8(as_argument(x), as_argument(weight), as_argument(scale), offset, as_argument(out))
    return out
