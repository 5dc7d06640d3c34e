"""Few tokens, up to 32 on matrix tiles: every weight is read once, at the speed of memory. Many are oneDNN's where
it has a product of the dtype; where it has none, torch's own is ten times slower than MKL's in float32.
"""

from __future__ import annotations

from functools import partial

import torch

from wemm.kernels.cpu import _kernels
from wemm.kernels.cpu.result_memory import empty
from wemm.kernels.cpu.tensors import DTYPE_CODES, as_argument
from wemm.ops.linear import linear

_ONEDNN = torch.backends.mkldnn.is_available()
HAS_PRODUCT = {
    torch.bfloat16: _ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    torch.float16: _ONEDNN and torch.ops.mkldnn._is_mkldnn_fp16_supported(),
}
"""oneDNN's, on this processor."""
# From here on the other is faster: docs/performance.md.
_HAS_TILES = _kernels.isa() == 3
MAX_TOKENS = {
    torch.bfloat16: 64 if not HAS_PRODUCT[torch.bfloat16] else 32 if _HAS_TILES else 4,
    torch.float16: 8 if HAS_PRODUCT[torch.float16] else 64,
}
PIECE = 2**21
"""Elements of the weight in float32 at a time: 8 MiB, which stay in the cache."""


def _takes(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    tensors = [x, weight] if bias is None else [x, weight, bias]
    return x.dim() == 2 and all(t.dtype == x.dtype and t.is_contiguous() for t in tensors)


def _supports(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
    return _takes(x, weight, bias) and x.shape[0] <= MAX_TOKENS.get(x.dtype, -1)


@linear.impl("cpp", device="cpu", supports=_supports)
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    out = empty((x.shape[0], weight.shape[0]), x.dtype)
    offset = None if bias is None else as_argument(bias)
    _kernels.linear(as_argument(x), as_argument(weight), offset, as_argument(out))
    return out


def _multiplies(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
    return HAS_PRODUCT.get(x.dtype, True) and x.dtype in DTYPE_CODES and _takes(x, weight, bias)


@linear.impl("reused_memory", device="cpu", supports=_multiplies)
def _(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    out = empty((x.shape[0], weight.shape[0]), x.dtype)
    return torch.mm(x, weight.T, out=out) if bias is None else torch.addmm(bias, x, weight.T, out=out)


def _widened(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    (tokens, width), outputs = x.shape, weight.shape[0]
    rows = min(outputs, max(1, PIECE // max(1, width)))
    wide, wide_weight, wide_out = x.float(), torch.empty(rows, width), torch.empty(tokens * rows)
    out = empty((tokens, outputs), x.dtype)
    for first in range(0, outputs, rows):
        piece = slice(first, min(first + rows, outputs))
        count = piece.stop - first
        sums = wide_out[: tokens * count].view(tokens, count)
        torch.mm(wide, wide_weight[:count].copy_(weight[piece]).T, out=sums)
        out[:, piece] = sums if bias is None else sums.add_(bias[piece])
    return out


def _is_of(dtype: torch.dtype, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
    return x.dtype is dtype and _takes(x, weight, bias)


for _dtype, _has_product in HAS_PRODUCT.items():
    _name = f"widened_{str(_dtype).removeprefix('torch.')}"
    linear.impl(_name, device="cpu", supports=partial(_is_of, _dtype), automatic=not _has_product)(_widened)
