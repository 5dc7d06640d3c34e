"""Up to four tokens: every weight is read once, at the speed of memory. More are oneDNN's, and better there."""

from __future__ import annotations

import torch

from wemm.kernels.cpu import _kernels
from wemm.kernels.cpu.tensors import as_argument
from wemm.ops.linear import linear

MAX_TOKENS = 4
"""csrc/kernels.h: kMaxGemvTokens."""


def _supports(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
    tensors = [x, weight] if bias is None else [x, weight, bias]
    fits = x.dim() == 2 and x.shape[0] <= MAX_TOKENS
    return fits and x.dtype in (torch.bfloat16, torch.float16) and all(
        t.dtype == x.dtype and t.is_contiguous() for t in tensors
    )


@linear.impl("cpp", device="cpu", supports=_supports)
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    out = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype)
    offset = None if bias is None else as_argument(bias)
    _kernels.linear(as_argument(x), as_argument(weight), offset, as_argument(out))
    return out
