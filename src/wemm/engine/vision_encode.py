"""Images of any sizes → the packed patches of one vision-tower call."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
import torch

from wemm.config import VisionConfig
from wemm.model.batch import ImageBatch
from wemm.platforms.transfer import to_device
from wemm.processing.image_processor import ProcessedImage, patch_extents, patchify, position_ids


def image_batch(images: Sequence[ProcessedImage], config: VisionConfig, device: torch.device) -> ImageBatch:
    """Pack images of any sizes into one vision-tower call. Pixels are sent as they are and cut on the device."""
    patches = [
        patchify(to_device(image.pixels, device), config.patch_size)
        for image in images
        if image.pixels is not None
    ]
    extents = [patch_extents(image.plan.resized, config.patch_size) for image in images]
    ids = [position_ids(image.plan.patch_grid, config.position_grid) for image in images]
    bounds = [0, *accumulate(image.plan.num_patches for image in images)]
    return ImageBatch(
        patches=torch.cat(patches),
        extents=to_device(torch.from_numpy(np.concatenate(extents)), device),
        position_ids=to_device(torch.from_numpy(np.concatenate(ids)), device),
        cu_seqlens=to_device(torch.tensor(bounds, dtype=torch.int32), device),
        patch_grids=tuple(image.plan.patch_grid for image in images),
    )
