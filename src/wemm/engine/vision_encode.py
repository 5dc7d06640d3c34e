"""Images of any sizes → the packed patches of one vision-tower call."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch

from wemm.config import VisionConfig
from wemm.model.batch import ImageBatch
from wemm.processing.image_processor import ProcessedImage, normalize_pixels, patchify, position_ids


def image_batch(
    images: Sequence[ProcessedImage], config: VisionConfig, dtype: torch.dtype, device: torch.device
) -> ImageBatch:
    """Pack images of any sizes into one vision-tower call; pixels are normalised on the device."""
    patches = [
        patchify(normalize_pixels(image.pixels.to(device), config.patch_size), config.patch_size).to(dtype)
        for image in images
        if image.pixels is not None
    ]
    ids = [position_ids(image.plan.patch_grid, config.position_grid) for image in images]
    bounds = [0, *accumulate(image.plan.num_patches for image in images)]
    return ImageBatch(
        patches=torch.cat(patches),
        position_ids=torch.from_numpy(np.concatenate(ids)).to(device),
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32, device=device),
        patch_grids=tuple(image.plan.patch_grid for image in images),
    )
