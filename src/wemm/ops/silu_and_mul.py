"""Gate of the language model's feed-forward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from wemm.ops.registry import Inputs, op


def _cases(inputs: Inputs) -> Mapping[str, tuple[Any, ...]]:
    return {
        "prefill": (inputs.normal(128, 14336), inputs.normal(128, 14336)),
        "decode": (inputs.normal(1, 14336, scale=10), inputs.normal(1, 14336)),
    }


@op(_cases)
def silu_and_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, in float32. gate and up: [num_tokens, intermediate_size] → like gate."""
    return (F.silu(gate.to(torch.float32)) * up.to(torch.float32)).to(gate.dtype)
