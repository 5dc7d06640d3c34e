"""The vision tower's first layer: pixels are normalised where they are multiplied."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from wemm.ops.linear import linear
from wemm.ops.registry import Inputs, LazyCases, ModelShapes, op


def _case(
    inputs: Inputs, patches: int, hidden: int, patch_size: int, extents: list[list[int]] | None = None
) -> tuple[Any, ...]:
    """Without `extents` all patches are full."""
    width = 3 * patch_size**2
    filled = inputs.int32(extents or [[patch_size, patch_size]])
    return (
        inputs.uint8(patches, width),
        filled if extents else filled.repeat(patches, 1),
        inputs.normal(hidden, 3, patch_size, patch_size, scale=width**-0.5),
        inputs.normal(hidden),
    )


def _cases(inputs: Inputs) -> Mapping[str, tuple[Any, ...]]:
    edges = [[rows, columns] for rows in (14, 14, 3) for columns in (14, 14, 1)]
    return {
        "full": _case(inputs, 150, 140, 14),
        "padded": _case(inputs, 9, 200, 14, edges),
        "small patches": _case(inputs, 6, 48, 2, [[2, 2], [2, 1], [1, 2], [1, 1], [2, 2], [1, 2]]),
        "one patch": _case(inputs, 1, 70, 14),
    }


def _model_cases(inputs: Inputs, shapes: ModelShapes) -> LazyCases:
    vision = shapes.config.vision
    case = partial(_case, inputs, shapes.num_patches, vision.hidden_size, vision.patch_size)
    return {f"tower {shapes.num_patches}": case}


def _flops(patches: torch.Tensor, extents: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> int:
    return 2 * patches.shape[0] * weight.numel()


def normalize(patches: torch.Tensor, extents: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Samples of patches → float32 of the same shape in [-1, 1], 0 where a patch is beyond its image.

    Multiplied by float32(1/255), as the reference does: dividing by 255 differs in the last bit.
    patches: uint8 [num_patches, 3 * patch_size**2], extents: as those of embed_patches.
    """
    values = patches.to(torch.float32).mul_(1 / 255).sub_(0.5).div_(0.5)
    at = torch.arange(patch_size, device=patches.device)
    rows, columns = extents[:, :1, None], extents[:, 1:, None]
    outside = (at[:, None] >= rows) | (at >= columns)  # [num_patches, patch_size, patch_size]
    return values.view(-1, 3, patch_size, patch_size).masked_fill_(outside.unsqueeze(1), 0.0).flatten(1)


@op(_cases, model_cases=_model_cases, flops=_flops)
def embed_patches(
    patches: torch.Tensor, extents: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """The convolution of normalised patches whose stride is its kernel, one product per patch.

    patches: uint8 [num_patches, 3 * patch_size**2], by channel, row and column; extents: int32 [num_patches, 2],
    how many rows and columns of each patch are its image's: the rest is 0 after normalisation, which no uint8 is;
    weight: [hidden_size, 3, patch_size, patch_size], bias: [hidden_size] → [num_patches, hidden_size], for which
    normalised samples are rounded to the dtype of the weight.
    """
    values = normalize(patches, extents, weight.shape[-1])
    return linear(values.to(weight.dtype), weight.flatten(1), bias)
