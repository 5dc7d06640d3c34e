"""Root-mean-square norm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from wemm.ops.registry import Inputs, op


def _cases(inputs: Inputs) -> Mapping[str, tuple[Any, ...]]:
    return {
        "prefill": (inputs.normal(512, 4096), inputs.normal(4096), 1e-5),
        "decode": (inputs.normal(1, 4096), inputs.normal(4096), 1e-5),
        "odd width": (inputs.normal(3, 129, scale=30), inputs.normal(129), 1e-5),
        "zeros": (inputs.normal(2, 64, scale=0), inputs.normal(64), 1e-5),
    }


@op(_cases)
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in float32.

    x: [..., hidden_size], weight: [hidden_size] → like x.
    """
    values = x.to(torch.float32)
    values = values * torch.rsqrt(values.square().mean(dim=-1, keepdim=True) + eps)
    return (values * weight.to(torch.float32)).to(x.dtype)
