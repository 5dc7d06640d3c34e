"""Keys and values of new tokens into the paged cache."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from wemm.ops.registry import Inputs, LazyCases, ModelShapes, op, tensor_bytes
from wemm.quantization import quantize_kv

_BLOCK_SIZE = 16


def _cases(inputs: Inputs) -> Mapping[str, tuple[Any, ...]]:
    def caches() -> tuple[torch.Tensor, torch.Tensor]:
        return inputs.normal(8, 16, 2, 32), inputs.normal(8, 16, 2, 32)

    slots = inputs.permutation(8 * 16)
    return {
        "prefill": (inputs.normal(40, 2, 32), inputs.normal(40, 2, 32), *caches(), slots[:40]),
        "decode": (inputs.normal(1, 2, 32), inputs.normal(1, 2, 32), *caches(), slots[-1:]),
        "int8": (inputs.normal(40, 2, 32), inputs.normal(40, 2, 32), *map(quantize_kv, caches()), slots[:40]),
    }


def _model_cases(inputs: Inputs, shapes: ModelShapes) -> LazyCases:
    text = shapes.config.text

    def case(rows: int, num_tokens: int) -> tuple[Any, ...]:
        num_blocks = -(-num_tokens // _BLOCK_SIZE)
        new = rows, text.num_key_value_heads, text.head_dim
        cache = num_blocks, _BLOCK_SIZE, text.num_key_value_heads, text.head_dim
        slots = inputs.permutation(num_blocks * _BLOCK_SIZE)[:rows]
        return inputs.normal(*new), inputs.normal(*new), inputs.normal(*cache), inputs.normal(*cache), slots

    length = shapes.num_prompt_tokens
    return {
        **{f"decode {n}": partial(case, n, n * length) for n in shapes.decode_batches},
        f"prefill {length}": partial(case, length, length),
    }


def _moved_bytes(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> int:
    written = len(slot_mapping) * tensor_bytes((key_cache[0, 0], value_cache[0, 0]))
    return tensor_bytes((key, value)) + written + tensor_bytes(slot_mapping)


@op(_cases, model_cases=_model_cases, moved_bytes=_moved_bytes)
def store_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write token t to slot slot_mapping[t] (block * block_size + offset); returns both caches.

    key and value: [num_tokens, num_kv_heads, head_dim],
    caches: [num_blocks, block_size, num_kv_heads, head_dim], slot_mapping: int64 [num_tokens], distinct.
    Caches of int8 hold [..., head_dim + 4]: quantization.quantize_kv.
    """
    for new, cache in ((key, key_cache), (value, value_cache)):
        cache.flatten(0, 1)[slot_mapping] = quantize_kv(new) if cache.dtype is torch.int8 else new
    return key_cache, value_cache
