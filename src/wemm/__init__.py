"""WeMM: the inference engine for WeMM-Chat-2k-CN.

The public names, imported when first used so that `wemm --help` does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from wemm.engine.async_llm import AsyncLLM
    from wemm.engine.llm import LLM
    from wemm.errors import WemmError
    from wemm.request import (
        BeamSearchParams,
        CompletionOutput,
        Logprob,
        RequestMetrics,
        RequestOutput,
        SamplingParams,
        StructuredOutputsParams,
    )

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "AsyncLLM",
    "BeamSearchParams",
    "CompletionOutput",
    "Logprob",
    "RequestMetrics",
    "RequestOutput",
    "SamplingParams",
    "StructuredOutputsParams",
    "WemmError",
    "__version__",
]

_HOMES = {
    "LLM": "wemm.engine.llm",
    "AsyncLLM": "wemm.engine.async_llm",
    "BeamSearchParams": "wemm.request",
    "CompletionOutput": "wemm.request",
    "Logprob": "wemm.request",
    "RequestMetrics": "wemm.request",
    "RequestOutput": "wemm.request",
    "SamplingParams": "wemm.request",
    "StructuredOutputsParams": "wemm.request",
    "WemmError": "wemm.errors",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'wemm' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
