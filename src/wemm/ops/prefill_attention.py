"""Causal grouped-query attention of new tokens over the paged cache."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F

from wemm.ops.decode_attention import widened, with_int8_caches
from wemm.ops.registry import Inputs, LazyCases, ModelShapes, op, tensor_bytes

_BLOCK_SIZE = 16


def _case(
    inputs: Inputs, *spans: tuple[int, int], num_kv_heads: int = 2, group: int = 4, head_dim: int = 64
) -> tuple[Any, ...]:
    # (tokens computed before, new tokens) per sequence
    num_blocks = [-(-(before + new) // _BLOCK_SIZE) for before, new in spans]
    order = inputs.permutation(sum(num_blocks)).tolist()
    tables = [[order.pop() for _ in range(n)] + [0] * (max(num_blocks) - n) for n in num_blocks]
    cache_shape = (sum(num_blocks), _BLOCK_SIZE, num_kv_heads, head_dim)
    bounds = [0]
    for _, new in spans:
        bounds.append(bounds[-1] + new)
    return (
        inputs.normal(bounds[-1], num_kv_heads * group, head_dim),
        inputs.normal(*cache_shape),
        inputs.normal(*cache_shape),
        inputs.int32(tables),
        inputs.int32(bounds),
        inputs.int32([before + new for before, new in spans]),
        head_dim**-0.5,
    )


def _cases(inputs: Inputs) -> Mapping[str, tuple[Any, ...]]:
    case = partial(_case, inputs)
    return {
        "one prompt": case((0, 200)),
        "two prompts": case((0, 33), (0, 16)),
        "equal neighbours": case((0, 9), (0, 40), (0, 40), (16, 3), (16, 3)),
        "chunk after cached tokens": case((45, 20), (16, 1)),
        "no grouping": case((3, 10), num_kv_heads=4, group=1),
        "int8": with_int8_caches(case((45, 20), (0, 33))),
    }


def _model_cases(inputs: Inputs, shapes: ModelShapes) -> LazyCases:
    text, length = shapes.config.text, shapes.num_prompt_tokens
    heads = text.num_key_value_heads
    sizes = {"num_kv_heads": heads, "group": text.num_attention_heads // heads, "head_dim": text.head_dim}
    half = length // 2
    chunk = f"chunk of {length - half} after {half}"

    def case(*spans: tuple[int, int]) -> tuple[Any, ...]:
        return _case(inputs, *spans, **sizes)

    return {
        f"prefill {length}": lambda: case((0, length)),
        chunk: lambda: case((half, length - half)),
        f"{chunk}, int8": lambda: with_int8_caches(case((half, length - half))),
    }


def _flops(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
) -> int:
    spans = zip(cu_seqlens_q.diff().tolist(), seq_lens.tolist(), strict=True)
    num_pairs = sum(new * (2 * length - new + 1) // 2 for new, length in spans)  # causal
    return 4 * num_pairs * query.shape[1] * query.shape[2]


def _moved_bytes(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
) -> int:
    per_token = tensor_bytes((key_cache[0, 0], value_cache[0, 0]))
    small = tensor_bytes((block_tables, cu_seqlens_q, seq_lens))
    return 2 * tensor_bytes(query) + small + int(seq_lens.sum()) * per_token


@op(_cases, model_cases=_model_cases, flops=_flops, moved_bytes=_moved_bytes)
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
    block_tables: int32 [num_seqs, max_blocks] → like query. Caches of int8 are those of rope_and_store_kv.
    """
    block_size, num_kv_heads = key_cache.shape[1:3]
    head_dim = query.shape[2]
    group = query.shape[1] // num_kv_heads
    outputs = []
    start, first = 0, 0
    # Neighbouring whole prompts of one length are one call; a chunk, whose copy of earlier keys may be
    # long, is a call of its own.
    spans = enumerate(zip(cu_seqlens_q.diff().tolist(), seq_lens.tolist(), strict=True))
    calls = [(num_new, seq_len, i if num_new < seq_len else None) for i, (num_new, seq_len) in spans]
    for (num_new, seq_len, _), run in groupby(calls):
        num_seqs = len(list(run))
        stop, last = start + num_seqs * num_new, first + num_seqs
        blocks = block_tables[first:last, : -(-seq_len // block_size)].long()
        k, v = (
            widened(cache[blocks], query.dtype).flatten(1, 2)[:, :seq_len].transpose(1, 2).flatten(0, 1)
            for cache in (key_cache, value_cache)
        )  # [num_seqs * num_kv_heads, seq_len, head_dim]
        k, v = (x.unsqueeze(1).expand(-1, group, -1, -1) for x in (k, v))
        q = query[start:stop].view(num_seqs, num_new, num_kv_heads, group, head_dim).permute(0, 2, 3, 1, 4)
        q = q.flatten(0, 1)
        if num_new == seq_len:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        else:
            visible = torch.ones(num_new, seq_len, dtype=torch.bool, device=q.device).tril(seq_len - num_new)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale)
        y = y.unflatten(0, (num_seqs, num_kv_heads)).permute(0, 3, 1, 2, 4)
        outputs.append(y.reshape(num_seqs * num_new, -1, head_dim))
        start, first = stop, last
    return torch.cat(outputs)
