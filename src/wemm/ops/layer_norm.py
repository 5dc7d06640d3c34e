"""Layer norm of the vision tower."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from wemm.ops.registry import Inputs, LazyCases, ModelShapes, op


def _cases(inputs: Inputs) -> Mapping[str, tuple[Any, ...]]:
    return {
        "tower": (inputs.normal(147, 1152), inputs.normal(1152), inputs.normal(1152), 1e-6),
        "odd width": (inputs.normal(3, 77, scale=30), inputs.normal(77), inputs.normal(77), 1e-6),
    }


def _model_cases(inputs: Inputs, shapes: ModelShapes) -> LazyCases:
    vision = shapes.config.vision

    def case() -> tuple[Any, ...]:
        weight, bias = inputs.normal(vision.hidden_size), inputs.normal(vision.hidden_size)
        return inputs.normal(shapes.num_patches, vision.hidden_size), weight, bias, vision.layer_norm_eps

    return {f"tower {shapes.num_patches}": case}


def _flops(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> int:
    return 7 * x.numel()  # mean, centre, square, sum, scale, weight, bias


@op(_cases, model_cases=_model_cases, flops=_flops)
def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension, in float32.

    x: [..., hidden_size], weight and bias: [hidden_size] → like x.
    """
    wide = torch.float32
    return F.layer_norm(x.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps).to(x.dtype)
