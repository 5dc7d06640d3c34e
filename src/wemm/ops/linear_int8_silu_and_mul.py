"""Gate of the language model's feed-forward with its two products, both of weights of int8."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from wemm.ops.linear_int8 import linear_int8
from wemm.ops.registry import Inputs, LazyCases, ModelShapes, op
from wemm.ops.silu_and_mul import silu_and_mul


def gated_cases(scheme: str, width: int, inputs: Inputs) -> Mapping[str, tuple[Any, ...]]:
    """Two weights [330, width] of a scheme, and few or many tokens."""
    weights = (*inputs.quantized(scheme, 330, width), *inputs.quantized(scheme, 330, width))
    x = inputs.normal(20, width)
    spiked = x[:3].clone()
    spiked[:, 7] = 60
    return {
        "prefill": (x, *weights),
        "decode": (x[:1], *weights),
        "nine": (x[:9], *weights),
        "outliers": (spiked, *weights),
        "zeros": (torch.zeros_like(x[:2]), *weights),
        "none": (x[:0], *weights),
    }


def gated_model_cases(scheme: str, inputs: Inputs, shapes: ModelShapes) -> LazyCases:
    """w1 and w3 of the decoder."""
    hidden, wide = shapes.config.text.hidden_size, shapes.config.text.intermediate_size

    def case(rows: int) -> tuple[Any, ...]:
        gate, up = (inputs.quantized(scheme, wide, hidden) for _ in range(2))
        return inputs.normal(rows, hidden), *gate, *up

    return {f"decode {n}": partial(case, n) for n in shapes.decode_batches}


def _flops(
    x: torch.Tensor,
    gate_weight: torch.Tensor,
    gate_scale: torch.Tensor,
    up_weight: torch.Tensor,
    up_scale: torch.Tensor,
) -> int:
    return 2 * x.numel() * (gate_weight.shape[0] + up_weight.shape[0])


@op(
    partial(gated_cases, "int8", 515),
    model_cases=partial(gated_model_cases, "int8"),
    flops=_flops,
    arithmetic=torch.int8,
)
def linear_int8_silu_and_mul(
    x: torch.Tensor,
    gate_weight: torch.Tensor,
    gate_scale: torch.Tensor,
    up_weight: torch.Tensor,
    up_scale: torch.Tensor,
) -> torch.Tensor:
    """silu(linear_int8(x, gate …)) * linear_int8(x, up …), both products rounded to the dtype of x.

    x: [num_tokens, in], both weights: int8 [out, in], both scales: float32 [out] → [num_tokens, out].
    """
    return silu_and_mul(linear_int8(x, gate_weight, gate_scale), linear_int8(x, up_weight, up_scale))
