"""npu_rotary_mul in float32, as the definition rotates, and npu_scatter_nd_update_ into the caches.

The copies that widen and narrow also make contiguous what is cut out of qkv, so float32 costs no call more.
"""

from __future__ import annotations

import torch
import torch_npu

from wemm.kernels.npu.once_per_step import OncePerStep
from wemm.kernels.npu.rms_norm import DTYPES
from wemm.ops.rope_and_store_kv import rope_and_store_kv
from wemm.quantization import quantize_kv

_LARGEST_HEAD_DIM = 895
_MOST_HEADS = 999


def _supports(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> bool:
    num_kv_heads, num_heads, head_dim = qkv.shape[1:]
    fits = head_dim <= _LARGEST_HEAD_DIM and num_kv_heads * (num_heads - 1) <= _MOST_HEADS and qkv.numel() > 0
    caches = all(t.dtype in (qkv.dtype, torch.int8) and t.is_contiguous() for t in (key_cache, value_cache))
    return qkv.dtype in DTYPES and fits and caches


@rope_and_store_kv.impl("torch_npu", device="npu", supports=_supports)
def _(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    num_tokens, num_kv_heads, num_heads, head_dim = qkv.shape
    wide = qkv[:, :, :-1].to(torch.float32).reshape(1, num_tokens, -1, head_dim)  # BSND
    rotated = torch_npu.npu_rotary_mul(wide, _both_halves(cos), _both_halves(sin), rotary_mode="half")
    rotated = rotated.view(num_tokens, num_kv_heads, num_heads - 1, head_dim)
    slots = slot_mapping.unsqueeze(1)
    for new, cache in ((rotated[:, :, -1], key_cache), (qkv[:, :, -1], value_cache)):
        stored = quantize_kv(new) if cache.dtype is torch.int8 else new.to(cache.dtype)
        torch_npu.npu_scatter_nd_update_(cache.view(-1, *cache.shape[2:]), slots, stored)
    query = rotated[:, :, :-1].to(qkv.dtype).reshape(num_tokens, -1, head_dim)
    return query, key_cache, value_cache


@OncePerStep
def _both_halves(x: torch.Tensor) -> torch.Tensor:
    """[num_tokens, head_dim/2] → [1, num_tokens, 1, head_dim]."""
    return torch.cat((x, x), dim=-1)[None, :, None]
