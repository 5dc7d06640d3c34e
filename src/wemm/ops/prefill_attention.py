"""Causal grouped-query attention of new tokens over the paged cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from wemm.ops.registry import Inputs, op

_BLOCK_SIZE = 16


def _cases(inputs: Inputs) -> Mapping[str, tuple[Any, ...]]:
    def case(*spans: tuple[int, int], num_kv_heads: int = 2, group: int = 4) -> tuple[Any, ...]:
        # (tokens computed before, new tokens) per sequence
        num_blocks = [-(-(before + new) // _BLOCK_SIZE) for before, new in spans]
        order = inputs.permutation(sum(num_blocks)).tolist()
        tables = [[order.pop() for _ in range(n)] + [0] * (max(num_blocks) - n) for n in num_blocks]
        cache_shape = (sum(num_blocks), _BLOCK_SIZE, num_kv_heads, 64)
        bounds = [0]
        for _, new in spans:
            bounds.append(bounds[-1] + new)
        return (
            inputs.normal(bounds[-1], num_kv_heads * group, 64),
            inputs.normal(*cache_shape),
            inputs.normal(*cache_shape),
            inputs.int32(tables),
            inputs.int32(bounds),
            inputs.int32([before + new for before, new in spans]),
            64**-0.5,
        )

    return {
        "one prompt": case((0, 200)),
        "two prompts": case((0, 33), (0, 16)),
        "chunk after cached tokens": case((45, 20), (16, 1)),
        "no grouping": case((3, 10), num_kv_heads=4, group=1),
    }


@op(_cases)
def prefill_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Each new token attends to all tokens of its sequence up to itself, softmax in float32.

    query: [num_tokens, num_heads, head_dim], sequence i being rows cu_seqlens_q[i]:cu_seqlens_q[i+1]
    and the last positions of its seq_lens[i] tokens, whose keys and values (already stored) lie in
    the blocks block_tables[i]. caches: [num_blocks, block_size, num_kv_heads, head_dim],
    block_tables: int32 [num_seqs, max_blocks] → like query.
    """
    num_kv_heads, head_dim = key_cache.shape[2:]
    group = query.shape[1] // num_kv_heads
    outputs = []
    bounds, lengths = cu_seqlens_q.tolist(), seq_lens.tolist()
    for i, seq_len in enumerate(lengths):
        q = query[bounds[i] : bounds[i + 1]]
        blocks = block_tables[i, : -(-seq_len // key_cache.shape[1])].long()
        k, v = (
            cache[blocks].view(-1, num_kv_heads, head_dim)[:seq_len].transpose(0, 1).unsqueeze(1)
            for cache in (key_cache, value_cache)
        )  # [num_kv_heads, 1, seq_len, head_dim]
        k, v = (x.expand(-1, group, -1, -1) for x in (k, v))
        num_new = q.shape[0]
        q = q.view(num_new, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
        if num_new == seq_len:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        else:
            visible = torch.ones(num_new, seq_len, dtype=torch.bool, device=q.device).tril(seq_len - num_new)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale)
        outputs.append(y.permute(2, 0, 1, 3).reshape(num_new, -1, head_dim))
    return torch.cat(outputs)
