"""Rotary position embedding of new tokens, whose keys and values go into the paged cache."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from wemm.ops.registry import Inputs, LazyCases, ModelShapes, op, tensor_bytes
from wemm.quantization import quantize_kv

_BLOCK_SIZE = 16


def _case(
    inputs: Inputs, tokens: int, num_kv_heads: int, group: int, head_dim: int, capacity: int, int8: bool = False
) -> tuple[Any, ...]:
    qkv = inputs.normal(tokens, num_kv_heads, group + 2, head_dim)
    angle = torch.pi * inputs.float32(tokens, head_dim // 2)
    num_blocks = -(-capacity // _BLOCK_SIZE)
    caches = [inputs.normal(num_blocks, _BLOCK_SIZE, num_kv_heads, head_dim) for _ in range(2)]
    if int8:
        caches = [quantize_kv(cache) for cache in caches]
    slots = inputs.permutation(num_blocks * _BLOCK_SIZE)[:tokens]
    return qkv, angle.cos(), angle.sin(), *caches, slots


def _cases(inputs: Inputs) -> Mapping[str, tuple[Any, ...]]:
    case = partial(_case, inputs, capacity=128)
    return {
        "prefill": case(40, 2, 4, 128),
        "decode": case(1, 2, 4, 32),
        "no grouping, odd pairs": case(5, 3, 1, 6),
        "int8": case(40, 2, 4, 32, int8=True),
        "int8, one token": case(1, 1, 2, 128, int8=True),
    }


def _model_cases(inputs: Inputs, shapes: ModelShapes) -> LazyCases:
    text, length = shapes.config.text, shapes.num_prompt_tokens
    heads = text.num_key_value_heads
    case = partial(
        _case, inputs, num_kv_heads=heads, group=text.num_attention_heads // heads, head_dim=text.head_dim
    )
    return {
        **{f"decode {n}": partial(case, n, capacity=n * length) for n in shapes.decode_batches},
        f"prefill {length}": partial(case, length, capacity=length),
        f"prefill {length}, int8": partial(case, length, capacity=length, int8=True),
    }


def _flops(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> int:
    return 3 * qkv[:, :, :-1].numel()


def _moved_bytes(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> int:
    query = tensor_bytes(qkv) * (qkv.shape[2] - 2) // qkv.shape[2]
    stored = len(slot_mapping) * tensor_bytes((key_cache[0, 0], value_cache[0, 0]))
    return tensor_bytes((qkv, cos, sin, slot_mapping)) + query + stored


@op(_cases, model_cases=_model_cases, flops=_flops, moved_bytes=_moved_bytes)
def rope_and_store_kv(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The rotated queries, and both caches, in which token t's rotated key and value are in slot slot_mapping[t].

    qkv: [num_tokens, num_kv_heads, group + 2, head_dim], per KV head its query heads, its key, its value; cos and
    sin: float32 [num_tokens, head_dim/2], the angles of the pairs (i, i + head_dim/2), rotated in float32;
    caches: [num_blocks, block_size, num_kv_heads, head_dim], or int8 [..., head_dim + 4] of quantize_kv;
    slot_mapping: int64 [num_tokens], block * block_size + offset, distinct → [num_tokens, num_heads, head_dim].
    """
    query, key, value = qkv.split((qkv.shape[2] - 2, 1, 1), dim=2)
    for new, cache in ((_rotated(key, cos, sin), key_cache), (value, value_cache)):
        stored = quantize_kv(new) if cache.dtype is torch.int8 else new.to(cache.dtype)
        cache.flatten(0, 1)[slot_mapping] = stored.squeeze(2)
    return _rotated(query, cos, sin).flatten(1, 2).to(qkv.dtype), key_cache, value_cache


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.to(torch.float32).chunk(2, dim=-1)
    cos, sin = cos[:, None, None], sin[:, None, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
