"""One pass over the packed projection; keys and values go straight into the cache."""

from __future__ import annotations

import torch

from wemm.kernels.cpu import _kernels
from wemm.kernels.cpu.result_memory import empty
from wemm.kernels.cpu.tensors import DTYPE_CODES, as_argument
from wemm.ops.rope_and_store_kv import rope_and_store_kv


def _supports(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> bool:
    angles = all(t.dtype is torch.float32 and t.is_contiguous() for t in (cos, sin))
    cached = all(t.dtype in (qkv.dtype, torch.int8) and t.is_contiguous() for t in (key_cache, value_cache))
    slots = slot_mapping.dtype is torch.int64 and slot_mapping.is_contiguous()
    return angles and cached and slots and qkv.dtype in DTYPE_CODES and qkv.is_contiguous()


@rope_and_store_kv.impl("cpp", device="cpu", supports=_supports)
def _(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    num_tokens, num_kv_heads, packed, head_dim = qkv.shape
    query = empty((num_tokens, num_kv_heads * (packed - 2), head_dim), qkv.dtype)
    given = as_argument(qkv), as_argument(cos), as_argument(sin), as_argument(key_cache), as_argument(value_cache)
    _kernels.rope_and_store_kv(*given, as_argument(slot_mapping), as_argument(query))
    return query, key_cache, value_cache
