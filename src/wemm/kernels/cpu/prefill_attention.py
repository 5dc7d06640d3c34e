"""The flash attention of vision_attention.py, causal and over the paged cache."""

from __future__ import annotations

import torch

from wemm.kernels.cpu import _kernels
from wemm.kernels.cpu.result_memory import empty
from wemm.kernels.cpu.tensors import as_argument
from wemm.kernels.cpu.vision_attention import takes
from wemm.ops.prefill_attention import prefill_attention


def _supports(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
) -> bool:
    caches = (key_cache, value_cache)
    stored = torch.int8 if key_cache.dtype is torch.int8 else query.dtype
    cached = all(x.dtype is stored and x.is_contiguous() for x in caches)
    return _kernels.has_avx512_bf16() and scale >= 0 and takes(query) and cached


@prefill_attention.impl("cpp", device="cpu", supports=_supports)
def _(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    out = empty(query.shape, query.dtype)
    q, keys, values = as_argument(query), as_argument(key_cache), as_argument(value_cache)
    tables, bounds, lengths = block_tables.tolist(), cu_seqlens_q.tolist(), seq_lens.tolist()
    _kernels.prefill_attention(q, keys, values, tables, bounds, lengths, scale, as_argument(out))
    return out
