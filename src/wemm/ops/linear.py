"""Matrix product with a weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from wemm.ops.registry import Inputs, op


def _cases(inputs: Inputs) -> Mapping[str, tuple[Any, ...]]:
    weight = inputs.normal(1024, 512, scale=512**-0.5)
    return {
        "prefill": (inputs.normal(128, 512), weight, None),
        "decode": (inputs.normal(1, 512), weight, None),
        "bias": (inputs.normal(7, 512), weight, inputs.normal(1024)),
    }


@op(_cases)
def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weight.T + bias. x: [num_tokens, in], weight: [out, in], bias: [out] → [num_tokens, out]."""
    return F.linear(x, weight, bias)
