"""Fused ops of torch_npu for Ascend NPUs, called as documented. Not yet run on one: docs/ascend.md."""

from __future__ import annotations

from wemm.kernels.npu import (  # noqa: F401 - each module attaches itself
    decode_attention,
    linear_int8,
    linear_int8_gelu,
    prefill_attention,
    rms_norm,
    rope_and_store_kv,
    silu_and_mul,
    vision_attention,
)
from wemm.kernels.npu.once_per_step import forget as release_memory  # noqa: F401 - called by wemm.kernels
