"""One pass, over heads as they lie in the packed projection too."""

from __future__ import annotations

import torch

from wemm.kernels.cpu import _kernels
from wemm.kernels.cpu.tensors import DTYPE_CODES, as_argument
from wemm.ops.rotary_embedding import rotary_embedding


def _supports(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    angles = all(t.dtype is torch.float32 and t.is_contiguous() for t in (cos, sin))
    return angles and x.dtype in DTYPE_CODES and x.stride(-1) == 1


@rotary_embedding.impl("cpp", device="cpu", supports=_supports)
def _(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    out = torch.empty(x.shape, dtype=x.dtype)
    _kernels.rotary_embedding(as_argument(x), as_argument(cos), as_argument(sin), as_argument(out))
    return out
