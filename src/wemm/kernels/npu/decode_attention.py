"""All sequences in one call, keys and values read where they lie."""

from __future__ import annotations

import torch

from wemm.kernels.npu.fused_attention import ALIGNMENT, attend_paged, has_blocks_for, takes_cached
from wemm.kernels.npu.once_per_step import as_list
from wemm.ops.decode_attention import decode_attention


def _supports(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
) -> bool:
    fits = key_cache.shape[1] % ALIGNMENT == 0 and takes_cached(query, key_cache, value_cache)
    return fits and has_blocks_for(key_cache, as_list(seq_lens))


@decode_attention.impl("torch_npu", device="npu", supports=_supports)
def _(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    lengths = as_list(seq_lens)
    return attend_paged(query.unsqueeze(1), key_cache, value_cache, scale, block_tables, lengths).squeeze(1)
