"""Weights of int4 as they lie in the file: read once for few tokens, in blocks that stay in caches for many."""

from __future__ import annotations

import torch

from wemm.kernels.cpu import _kernels
from wemm.kernels.cpu.result_memory import empty
from wemm.kernels.cpu.tensors import DTYPE_CODES, as_argument
from wemm.ops.linear_int4 import linear_int4

MAX_GEMV_TOKENS = 4
"""csrc/linear_int4.h: kMaxInt4GemvTokens. More take VNNI or matrix tiles."""


def _supports(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> bool:
    numbers = [x] if bias is None else [x, bias]
    fits = x.dim() == 2 and (x.shape[0] <= MAX_GEMV_TOKENS or _kernels.has_avx512_vnni())
    same = x.dtype in DTYPE_CODES and all(t.dtype is x.dtype for t in numbers)
    return fits and same and all(t.is_contiguous() for t in (*numbers, weight, scale))


@linear_int4.impl("cpp", device="cpu", supports=_supports)
def _(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    out = empty((x.shape[0], weight.shape[0]), x.dtype)
    offset = None if bias is None else as_argument(bias)
    _kernels.linear_int4(as_argument(x), as_argument(weight), as_argument(scale), offset, as_argument(out))
    return out
