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
    tensors = (query, key_cache, value_cache)
    indices = all(t.dtype is torch.int32 and t.is_contiguous() for t in (block_tables, seq_lens))
    floats = all(t.dtype == query.dtype and t.is_contiguous() for t in tensors)
    return indices and floats and query.dtype in DTYPE_CODES


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
