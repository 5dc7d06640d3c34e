"""Triton kernels. Without Triton nothing is attached and the definitions run.

Tests compute them by Triton's interpreter and compile them; on a GPU `make gpu-check` compares and measures them.
"""

from __future__ import annotations

import importlib.util
import logging

import torch

if importlib.util.find_spec("triton") is None:
    logging.getLogger(__name__).info("Triton is not installed: CUDA ops run their definitions")
elif torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
    logging.getLogger(__name__).info("a GPU before Ampere: CUDA ops run their definitions")
else:
    from wemm.kernels.cuda import (  # noqa: F401 - each module attaches itself
        add_plora,
        add_plora_pair,
        add_rms_norm,
        decode_attention,
        embed_patches,
        keep_top_p,
        layer_norm,
        linear,
        linear_int4,
        linear_int4_silu_and_mul,
        linear_int8,
        linear_int8_gelu,
        linear_int8_silu_and_mul,
        linear_silu_and_mul,
        prefill_attention,
        rms_norm,
        rope_and_store_kv,
        silu_and_mul,
        vision_attention,
    )
    from wemm.kernels.cuda.recording import RECORDER  # noqa: F401 - called by wemm.kernels


def release_memory() -> None:
    """Kernels hold nothing; what torch's allocator keeps goes back to the driver."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
