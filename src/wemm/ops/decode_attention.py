"""Grouped-query attention of one new token per sequence over the paged cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from wemm.ops.registry import Inputs, LazyCases, ModelShapes, op, tensor_bytes
from wemm.quantization import dequantize_kv, quantize_kv

_BLOCK_SIZE = 16
_SEQS_PER_CALL = 16


def _case(
    inputs: Inputs, *lengths: int, num_kv_heads: int = 2, group: int = 4, head_dim: int = 128
) -> tuple[Any, ...]:
    num_blocks = [-(-length // _BLOCK_SIZE) for length in lengths]
    order = inputs.permutation(sum(num_blocks)).tolist()
    tables = [[order.pop() for _ in range(n)] + [0] * (max(num_blocks) - n) for n in num_blocks]
    cache_shape = (sum(num_blocks), _BLOCK_SIZE, num_kv_heads, head_dim)
    return (
        inputs.normal(len(lengths), num_kv_heads * group, head_dim),
        inputs.normal(*cache_shape),
        inputs.normal(*cache_shape),
        inputs.int32(tables),
        inputs.int32(lengths),
        head_dim**-0.5,
    )


def _cases(inputs: Inputs) -> Mapping[str, tuple[Any, ...]]:
    case = partial(_case, inputs)
    return {
        "one sequence": case(300),
        "mixed lengths": case(1, 17, 160),
        "many": case(*range(1, 40)),
        "no grouping": case(5, 33, group=1),
        "int8": with_int8_caches(case(1, 17, 160)),
    }


def with_int8_caches(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same case, its keys and values as a cache of int8 keeps them."""
    query, key_cache, value_cache, *rest = arguments
    return query, quantize_kv(key_cache), quantize_kv(value_cache), *rest


def _model_cases(inputs: Inputs, shapes: ModelShapes) -> LazyCases:
    text, length = shapes.config.text, shapes.num_prompt_tokens
    heads = text.num_key_value_heads
    sizes = {"num_kv_heads": heads, "group": text.num_attention_heads // heads, "head_dim": text.head_dim}

    def int8(*lengths: int) -> tuple[Any, ...]:
        return with_int8_caches(_case(inputs, *lengths, **sizes))

    cases: dict[str, Callable[[], tuple[Any, ...]]] = {}
    for n in shapes.decode_batches:
        cases[f"decode {n}, context {length}"] = partial(_case, inputs, *[length] * n, **sizes)
        cases[f"decode {n}, context {length}, int8"] = partial(int8, *[length] * n)
    return cases


def _flops(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
) -> int:
    return 4 * int(seq_lens.sum()) * query.shape[1] * query.shape[2]


def _moved_bytes(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
) -> int:
    per_token = tensor_bytes((key_cache[0, 0], value_cache[0, 0]))
    return 2 * tensor_bytes(query) + tensor_bytes((block_tables, seq_lens)) + int(seq_lens.sum()) * per_token


@op(_cases, model_cases=_model_cases, flops=_flops, moved_bytes=_moved_bytes)
def decode_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_tables: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Token i attends to the seq_lens[i] tokens of its sequence, itself included; softmax in float32.

    query: [num_seqs, num_heads, head_dim], caches: [num_blocks, block_size, num_kv_heads, head_dim],
    block_tables: int32 [num_seqs, max_blocks], seq_lens: int32 [num_seqs] → like query.
    Caches of int8 are those of rope_and_store_kv.
    """
    block_size, num_kv_heads = key_cache.shape[1:3]
    outputs = []
    for first in range(0, len(seq_lens), _SEQS_PER_CALL):  # padding is bounded
        part = slice(first, first + _SEQS_PER_CALL)
        lengths = seq_lens[part]
        longest = int(lengths.max())
        visible = torch.arange(longest, device=query.device) < lengths.unsqueeze(1)  # [num_seqs, longest]
        blocks = block_tables[part, : -(-longest // block_size)].long()
        # What lies behind the end of a sequence may be NaN, which no mask makes harmless.
        k, v = (
            widened(cache[blocks], query.dtype)
            .flatten(1, 2)[:, :longest]
            .masked_fill(~visible[:, :, None, None], 0)
            .transpose(1, 2)
            for cache in (key_cache, value_cache)
        )  # [num_seqs, num_kv_heads, longest, head_dim]
        # The query heads of a group attend to the same keys: they are the queries of one KV head.
        q = query[part].unflatten(1, (num_kv_heads, -1))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None, None], scale=scale)
        outputs.append(y.flatten(1, 2))
    return torch.cat(outputs)


def widened(blocks: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Keys or values out of a cache, as they are multiplied."""
    return dequantize_kv(blocks).to(dtype) if blocks.dtype is torch.int8 else blocks
