"""A call per sequence. Blocks of 128 to 512 are read where they lie, smaller ones are gathered first."""

from __future__ import annotations

import torch

from wemm.kernels.npu.fused_attention import attend, attend_paged, takes_cached
from wemm.kernels.npu.once_per_step import as_list
from wemm.ops.prefill_attention import prefill_attention

_PAGED_BLOCK_SIZES = range(128, 513, 128)


def _supports(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
) -> bool:
    return takes_cached(query, key_cache, value_cache)


@prefill_attention.impl("torch_npu", device="npu", supports=_supports)
def _(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    block_size = key_cache.shape[1]
    bounds, outputs = as_list(cu_seqlens_q), []
    for i, length in enumerate(as_list(seq_lens)):
        q, blocks = query[bounds[i] : bounds[i + 1]].unsqueeze(0), block_tables[i : i + 1]
        if block_size in _PAGED_BLOCK_SIZES:
            y = attend_paged(q, key_cache, value_cache, scale, blocks, [length], is_causal=True)
        else:
            used = blocks[0, : -(-length // block_size)].long()
            k, v = (cache[used].flatten(0, 1)[:length].unsqueeze(0) for cache in (key_cache, value_cache))
            y = attend(q, k, v, scale, is_causal=True)
        outputs.append(y.squeeze(0))
    return torch.cat(outputs)
