"""Layer norm of the vision tower."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from wemm.ops.registry import Inputs, op


def _cases(inputs: Inputs) -> Mapping[str, tuple[Any, ...]]:
    return {
        "tower": (inputs.normal(735, 1152), inputs.normal(1152), inputs.normal(1152), 1e-6),
        "odd width": (inputs.normal(3, 77, scale=30), inputs.normal(77), inputs.normal(77), 1e-6),
    }


@op(_cases)
def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension, in float32.

    x: [..., hidden_size], weight and bias: [hidden_size] → like x.
    """
    wide = torch.float32
    return F.layer_norm(x.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps).to(x.dtype)
