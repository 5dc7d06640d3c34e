"""Keys and values are read where they lie, once for all query heads that share them."""

from __future__ import annotations

import torch

from wemm.kernels.cpu import _kernels
from wemm.kernels.cpu.tensors import DTYPE_CODES, as_argument
from wemm.ops.decode_attention import decode_attention


def _supports(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
) -> bool:
    stored = torch.int8 if key_cache.dtype is torch.int8 else query.dtype
    caches = all(t.dtype is stored and t.is_contiguous() for t in (key_cache, value_cache))
    indices = all(t.dtype is torch.int32 and t.is_contiguous() for t in (block_tables, seq_lens))
    return caches and indices and query.dtype in DTYPE_CODES and query.is_contiguous()


@decode_attention.impl("cpp", device="cpu", supports=_supports)
def _(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    out = torch.empty_like(query)
    given = as_argument(query), as_argument(key_cache), as_argument(value_cache)
    where = as_argument(block_tables), as_argument(seq_lens)
    _kernels.decode_attention(*given, *where, scale, as_argument(out))
    return out
