"""The first half of the vision tower's MLP: a product and its activation."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from wemm.ops.registry import Inputs, LazyCases, ModelShapes, looser, op


def _cases(inputs: Inputs) -> Mapping[str, tuple[Any, ...]]:
    weight, bias = inputs.normal(430, 115, scale=115**-0.5), inputs.normal(430)
    return {
        "tower": (inputs.normal(147, 115), weight, bias),
        "one patch": (inputs.normal(1, 115), weight, bias),
        "far from zero": (inputs.normal(5, 115, scale=30), weight, bias),
    }


def _model_cases(inputs: Inputs, shapes: ModelShapes) -> LazyCases:
    vision, patches = shapes.config.vision, shapes.num_patches

    def case() -> tuple[Any, ...]:
        width, wide = vision.hidden_size, vision.intermediate_size
        weight = inputs.normal(wide, width, scale=width**-0.5)
        return inputs.normal(patches, width), weight, inputs.normal(wide)

    return {f"tower {patches}": partial(case)}


def _flops(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> int:
    return 2 * x.shape[0] * weight.numel()


# The product is rounded before the activation, whose slope is up to 1.13: one more rounding.
@op(_cases, looser(2), model_cases=_model_cases, flops=_flops)
def linear_gelu(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """gelu(x @ weight.T + bias), the tanh form. x: [num_patches, in], weight: [out, in], bias: [out]."""
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")
