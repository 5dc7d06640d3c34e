"""npu_fused_infer_attention_score_v2: what prefill, decode and the vision tower call, in the layout BSND.

TND would take sequences of all lengths in one call, but is documented for bfloat16 and head_dim 128 or 192 only.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch_npu

ALIGNMENT = 16
"""Of head_dim, and of the block size for one new token per sequence."""
_LARGEST_HEAD_DIM = 512
_MOST_HEADS = 256
_LARGEST_GROUP = 64
_MOST_FEATURES = 65535
"""num_heads * head_dim must be smaller."""
_MOST_ELEMENTS = 2**31 - 1
_MASK_SIZE = 2048
"""Whatever the lengths: the op repeats this square's triangle along the diagonal."""
_NO_MASK, _CAUSAL_FROM_THE_END = 0, 3
"""Values of sparse_mode."""


def takes(query: torch.Tensor, num_kv_heads: int, head_dim: int) -> bool:
    """Queries [num_tokens, num_heads, any], the width being head_dim."""
    num_heads = query.shape[1]
    heads = num_heads <= _MOST_HEADS and num_heads <= num_kv_heads * _LARGEST_GROUP
    width = head_dim % ALIGNMENT == 0 and head_dim <= _LARGEST_HEAD_DIM and num_heads * head_dim < _MOST_FEATURES
    return query.dtype in (torch.float16, torch.bfloat16) and query.numel() > 0 and heads and width


def takes_cached(query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor) -> bool:
    """Queries, and caches of their dtype."""
    caches = (key_cache, value_cache)
    stored = all(t.dtype is query.dtype and t.is_contiguous() and t.numel() <= _MOST_ELEMENTS for t in caches)
    return stored and query.is_contiguous() and takes(query, key_cache.shape[2], query.shape[2])


def has_blocks_for(key_cache: torch.Tensor, lengths: Sequence[int]) -> bool:
    """As many as the sequences would need if they shared none, which the op is documented to ask for."""
    num_blocks, block_size = key_cache.shape[:2]
    return sum(-(-length // block_size) for length in lengths) <= num_blocks


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, is_causal: bool = False
) -> torch.Tensor:
    """query: [num_seqs, num_new, num_heads, head_dim], keys and values the same with theirs → like query.

    If causal, the new tokens are the last of those that have keys.
    """
    return _call(query, key, value, scale, key.shape[2], is_causal)


def attend_paged(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    scale: float,
    block_tables: torch.Tensor,
    lengths: Sequence[int],
    is_causal: bool = False,
) -> torch.Tensor:
    """The same over caches [num_blocks, block_size, num_kv_heads, head_dim], `lengths` of each sequence."""
    block_size, num_kv_heads = key_cache.shape[1:3]
    key, value = key_cache.flatten(2), value_cache.flatten(2)
    return _call(query, key, value, scale, num_kv_heads, is_causal, block_tables, lengths, block_size)


def _call(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    num_kv_heads: int,
    is_causal: bool,
    block_tables: torch.Tensor | None = None,
    lengths: Sequence[int] | None = None,
    block_size: int = 0,
) -> torch.Tensor:
    is_masked = is_causal and query.shape[1] > 1  # the last token sees all
    return torch_npu.npu_fused_infer_attention_score_v2(
        query,
        key,
        value,
        atten_mask=_hidden(query.device) if is_masked else None,
        actual_seq_kvlen=lengths,
        block_table=block_tables,
        num_query_heads=query.shape[2],
        num_key_value_heads=num_kv_heads,
        softmax_scale=scale,
        input_layout="BSND",
        sparse_mode=_CAUSAL_FROM_THE_END if is_masked else _NO_MASK,
        block_size=block_size,
    )[0]


@lru_cache(maxsize=8)
def _hidden(device: torch.device) -> torch.Tensor:
    """True: not attended to."""
    return torch.ones(_MASK_SIZE, _MASK_SIZE, dtype=torch.bool, device=device).triu(1)
