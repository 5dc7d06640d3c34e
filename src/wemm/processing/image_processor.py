"""The original's image processor, bit for bit: an image → pixels, patches and their positions.

The resize rule is in resize.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from wemm.config import ModelConfig
from wemm.processing.resize import (
    NUM_SEPARATORS_PER_IMAGE,
    ImagePlan,
    hash_pixels,
    plan_image,
    resize_image,
    resized_size,
)

__all__ = [
    "NUM_SEPARATORS_PER_IMAGE",
    "ImagePlan",
    "ImageProcessor",
    "ProcessedImage",
    "normalize_pixels",
    "patchify",
    "position_buckets",
    "position_ids",
    "resized_size",
]


@dataclass(frozen=True)
class ProcessedImage:
    """A resized image, ready for the vision tower."""

    pixels: torch.Tensor | None  # uint8 [height, width, 3]; None where only size and hash matter
    plan: ImagePlan
    sha256: str
    """Of the resized pixels and their shape: equal hashes mean equal embeddings."""


class ImageProcessor:
    """The image rules of one checkpoint."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config

    def plan(self, width: int, height: int, detail: str = "auto") -> ImagePlan:
        """Cost of an image of `width` x `height` pixels, without decoding it. Raises PromptError."""
        return plan_image(width, height, self._config, detail)

    def process(self, image: Image.Image, detail: str = "auto") -> ProcessedImage:
        """Resize an RGB image; how far is the model's rule and `detail`. Raises PromptError."""
        plan = self.plan(image.width, image.height, detail)
        pixels = resize_image(image, plan.resized)
        return ProcessedImage(torch.from_numpy(pixels), plan, hash_pixels(pixels))


def normalize_pixels(pixels: torch.Tensor, patch_size: int) -> torch.Tensor:
    """uint8 [height, width, 3] → float32 [3, padded height, padded width] in [-1, 1].

    Multiplied by float32(1/255), as the reference does: dividing by 255 differs in the last bit.
    Padding (bottom and right, to whole patches) is 0 after normalisation.
    """
    values = (pixels.permute(2, 0, 1).to(torch.float32) * (1 / 255) - 0.5) / 0.5
    height, width = values.shape[1:]
    return F.pad(values, (0, -width % patch_size, 0, -height % patch_size))


def patchify(pixel_values: torch.Tensor, patch_size: int) -> torch.Tensor:
    """[3, height, width] → [num_patches, 3 * patch_size**2], patches row-major."""
    channels, height, width = pixel_values.shape
    grid = pixel_values.reshape(channels, height // patch_size, patch_size, width // patch_size, patch_size)
    return grid.permute(1, 3, 0, 2, 4).reshape(-1, channels * patch_size * patch_size)


def position_buckets(num_patches: int, position_grid: int) -> np.ndarray:
    """Row (or column) of the position table for each patch along one axis. int64 [num_patches].

    The original's float32 formula: it differs by one from floor(i * grid / num) in places, and from
    the formula of newer libraries.
    """
    fractions = _arange_float32(0.0, 1 - 1e-6, float(np.float32(1) / np.float32(num_patches)))
    boundaries = _arange_float32(1 / position_grid, 1.0, 1 / position_grid)
    return np.searchsorted(boundaries, fractions, side="right").astype(np.int64)


def _arange_float32(start: float, stop: float, step: float) -> np.ndarray:
    # torch.arange as the reference ran it (x86), on every machine: lanes of 8 are counted from a
    # base already rounded to float32, and what is left after a multiple of 16 is counted singly.
    index = np.arange(math.ceil((stop - start) / step))
    base = (start + index // 8 * 8 * step).astype(np.float32).astype(np.float64)
    tail = len(index) // 16 * 16
    values = np.where(index < tail, base + index % 8 * step, start + index * step)
    return values.astype(np.float32)


def position_ids(patch_grid: tuple[int, int], position_grid: int) -> np.ndarray:
    """Row of the position table for every patch, row-major. int64 [num_patches]."""
    rows = position_buckets(patch_grid[0], position_grid)
    columns = position_buckets(patch_grid[1], position_grid)
    return (rows[:, None] * position_grid + columns[None, :]).reshape(-1)
