"""Matrix product with a weight of int4, a scale per row and group of 128 inputs (quantization.py: Int4)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from wemm.ops.linear_int8 import ROWS_AT_ONCE, quantized_model_cases
from wemm.ops.registry import Inputs, op
from wemm.quantization import SCHEMES, quantize_rows


def _cases(inputs: Inputs) -> Mapping[str, tuple[Any, ...]]:
    def weight_of(width: int) -> tuple[torch.Tensor, torch.Tensor]:
        return SCHEMES["int4"].quantize(inputs.normal(330, width, scale=width**-0.5))

    x, whole, filled = inputs.normal(70, 512), weight_of(512), weight_of(300)
    spiked = x[:3].clone()
    spiked[:, 7] = 60
    return {
        "prefill": (x, *whole, None),
        "decode": (x[:1], *whole, None),
        "four": (x[:4], *whole, None),
        "bias": (x[:7], *whole, inputs.normal(330)),
        "a group filled up": (inputs.normal(9, 300), *filled, None),
        "one group, not full": (inputs.normal(1, 24), *weight_of(24), None),
        "outliers": (spiked, *whole, None),
        "zeros": (torch.zeros_like(x[:2]), *whole, inputs.normal(330)),
        "none": (x[:0], *whole, None),
    }


def _flops(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None) -> int:
    return 2 * x.numel() * weight.shape[0]


@op(_cases, model_cases=partial(quantized_model_cases, "int4"), flops=_flops, arithmetic=torch.int8)
def linear_int4(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """x @ (weight * scale).T + bias, x rounded to int8 token by token.

    x: [num_tokens, in], weight: uint8 [out, 64 * groups], scale: bfloat16 [out, groups], bias: [out] →
    [num_tokens, out].
    """
    integers, x_scale = quantize_rows(x)
    y = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    for first in range(0, weight.shape[0], ROWS_AT_ONCE):
        rows = slice(first, first + ROWS_AT_ONCE)
        wide = SCHEMES["int4"].dequantize(weight[rows], scale[rows], x.shape[1])
        product = F.linear(integers, wide) * x_scale
        y[:, rows] = product if bias is None else product + bias[rows]
    return y
