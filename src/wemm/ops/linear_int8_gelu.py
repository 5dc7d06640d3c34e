"""The first half of the vision tower's MLP with a weight of int8: a product and its activation."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from wemm.ops.linear_int8 import linear_int8
from wemm.ops.registry import Inputs, LazyCases, ModelShapes, looser, op


def _cases(inputs: Inputs) -> Mapping[str, tuple[Any, ...]]:
    weight, bias = inputs.quantized("int8", 430, 115), inputs.normal(430)
    return {
        "tower": (inputs.normal(147, 115), *weight, bias),
        "one patch": (inputs.normal(1, 115), *weight, bias),
        "far from zero": (inputs.normal(5, 115, scale=30), *weight, bias),
    }


def _model_cases(inputs: Inputs, shapes: ModelShapes) -> LazyCases:
    vision, patches = shapes.config.vision, shapes.num_patches

    def case() -> tuple[Any, ...]:
        width, wide = vision.hidden_size, vision.intermediate_size
        return inputs.normal(patches, width), *inputs.quantized("int8", wide, width), inputs.normal(wide)

    return {f"tower {patches}": partial(case)}


def _flops(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> int:
    return 2 * x.shape[0] * weight.numel()


# As linear_gelu: the product is rounded before the activation.
@op(_cases, looser(2), model_cases=_model_cases, flops=_flops, arithmetic=torch.int8)
def linear_int8_gelu(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """gelu(linear_int8(x, weight, scale, bias)), the tanh form: x [num_patches, in] → [num_patches, out]."""
    return F.gelu(linear_int8.definition(x, weight, scale, bias), approximate="tanh")
