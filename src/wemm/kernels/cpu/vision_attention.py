"""Flash attention on matrix tiles, or on AVX-512 with BF16."""

from __future__ import annotations

import torch

from wemm.kernels.cpu import _kernels
from wemm.kernels.cpu.result_memory import empty
from wemm.kernels.cpu.tensors import as_argument
from wemm.ops.vision_attention import vision_attention

MAX_HEAD_DIM = 256


def _supports(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor, scale: float
) -> bool:
    return _kernels.has_avx512_bf16() and scale >= 0 and all(takes(x) for x in (query, key, value))


def takes(x: torch.Tensor) -> bool:
    """Dtype, layout and head_dim of queries, keys, values or their cache."""
    head_dim = x.shape[-1]
    return x.dtype is torch.bfloat16 and x.is_contiguous() and head_dim % 2 == 0 and head_dim <= MAX_HEAD_DIM


@vision_attention.impl("cpp", device="cpu", supports=_supports)
def _(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor, scale: float
) -> torch.Tensor:
    out = empty(query.shape, query.dtype)
    q, k, v = as_argument(query), as_argument(key), as_argument(value)
    _kernels.vision_attention(q, k, v, cu_seqlens.tolist(), scale, as_argument(out))
    return out
