"""Triton kernels. Without Triton nothing is attached and the definitions run.

Nothing here has run on a GPU yet: unverified beyond Triton's interpreter and its compiler (tests/kernels/cuda).
"""

from __future__ import annotations

import importlib.util
import logging

import torch

if importlib.util.find_spec("triton") is not None:
    from wemm.kernels.cuda import (  # noqa: F401 - each module attaches itself
        decode_attention,
        prefill_attention,
        vision_attention,
    )
    from wemm.kernels.cuda.recording import record  # noqa: F401 - called by wemm.kernels
else:
    logging.getLogger(__name__).info("Triton is not installed: CUDA ops run their definitions")


def release_memory() -> None:
    """Kernels hold nothing; what torch's allocator keeps goes back to the driver."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
