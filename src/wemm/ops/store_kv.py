"""Keys and values of new tokens into the paged cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from wemm.ops.registry import Inputs, op


def _cases(inputs: Inputs) -> Mapping[str, tuple[Any, ...]]:
    def caches() -> tuple[torch.Tensor, torch.Tensor]:
        return inputs.normal(8, 16, 2, 32), inputs.normal(8, 16, 2, 32)

    slots = inputs.permutation(8 * 16)
    return {
        "prefill": (inputs.normal(40, 2, 32), inputs.normal(40, 2, 32), *caches(), slots[:40]),
        "decode": (inputs.normal(1, 2, 32), inputs.normal(1, 2, 32), *caches(), slots[-1:]),
    }


@op(_cases)
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
    """
    key_cache.view(-1, *key.shape[1:])[slot_mapping] = key
    value_cache.view(-1, *value.shape[1:])[slot_mapping] = value
    return key_cache, value_cache
