"""Full bidirectional attention of the vision tower over packed images."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F

from wemm.ops.registry import Inputs, LazyCases, ModelShapes, op


def _cases(inputs: Inputs) -> Mapping[str, tuple[Any, ...]]:
    def case(*lengths: int) -> tuple[Any, ...]:
        shape = (sum(lengths), 4, 72)
        bounds = [0]
        for length in lengths:
            bounds.append(bounds[-1] + length)
        query, key, value = (inputs.normal(*shape) for _ in range(3))
        return query, key, value, inputs.int32(bounds), 72**-0.5

    return {
        "one image": case(403),
        "three images": case(180, 1, 77),
        "equal neighbours": case(5, 60, 60, 60, 5),
    }


def _model_cases(inputs: Inputs, shapes: ModelShapes) -> LazyCases:
    vision = shapes.config.vision

    def case() -> tuple[Any, ...]:
        shape = shapes.num_patches, vision.num_attention_heads, vision.head_dim
        query, key, value = (inputs.normal(*shape) for _ in range(3))
        return query, key, value, inputs.int32([0, shapes.num_patches]), vision.head_dim**-0.5

    return {f"tower {shapes.num_patches}": case}


def _flops(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor, scale: float
) -> int:
    num_pairs = sum(length**2 for length in cu_seqlens.diff().tolist())
    return 4 * num_pairs * query.shape[1] * query.shape[2]  # two products; softmax is not counted


@op(_cases, model_cases=_model_cases, flops=_flops)
def vision_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor, scale: float
) -> torch.Tensor:
    """softmax(q k^T * scale) v within each image, softmax in float32.

    query, key, value: [num_patches, num_heads, head_dim], image i being rows
    cu_seqlens[i]:cu_seqlens[i+1] (int32 [num_images + 1]) → like query.
    """
    outputs = []
    start = 0
    # Neighbours of one length are one call: many small images cost no more than their arithmetic.
    for length, run in groupby(cu_seqlens.diff().tolist()):
        num_images = len(list(run))
        stop = start + num_images * length
        q, k, v = (
            x[start:stop].unflatten(0, (num_images, length)).transpose(1, 2) for x in (query, key, value)
        )  # [num_images, num_heads, length, head_dim]
        y = F.scaled_dot_product_attention(q, k, v, scale=scale)
        outputs.append(y.transpose(1, 2).flatten(0, 1))
        start = stop
    return torch.cat(outputs)
