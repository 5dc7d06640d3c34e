"""Gate of the language model's feed-forward with its two products, both of weights of int4."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from wemm.ops.linear_int4 import linear_int4
from wemm.ops.linear_int8_silu_and_mul import gated_cases, gated_model_cases
from wemm.ops.registry import Inputs, op
from wemm.ops.silu_and_mul import silu_and_mul


def _cases(inputs: Inputs) -> Mapping[str, tuple[Any, ...]]:
    filled = gated_cases("int4", 300, inputs)
    return {**gated_cases("int4", 512, inputs), "a group filled up": filled["nine"]}


def _flops(
    x: torch.Tensor,
    gate_weight: torch.Tensor,
    gate_scale: torch.Tensor,
    up_weight: torch.Tensor,
    up_scale: torch.Tensor,
) -> int:
    return 2 * x.numel() * (gate_weight.shape[0] + up_weight.shape[0])


@op(_cases, model_cases=partial(gated_model_cases, "int4"), flops=_flops, arithmetic=torch.int8)
def linear_int4_silu_and_mul(
    x: torch.Tensor,
    gate_weight: torch.Tensor,
    gate_scale: torch.Tensor,
    up_weight: torch.Tensor,
    up_scale: torch.Tensor,
) -> torch.Tensor:
    """silu(linear_int4(x, gate …)) * linear_int4(x, up …), both products rounded to the dtype of x.

    x: [num_tokens, in], both weights: uint8 [out, 64 * groups], both scales: bfloat16 [out, groups] →
    [num_tokens, out].
    """
    return silu_and_mul(linear_int4(x, gate_weight, gate_scale), linear_int4(x, up_weight, up_scale))
