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
    "patch_extents",
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


def patchify(pixels: torch.Tensor, patch_size: int) -> torch.Tensor:
    """uint8 [height, width, 3] → uint8 [num_patches, 3 * patch_size**2], by channel, row and column.

    Patches are row-major, at the bottom and on the right filled up: patch_extents says how much is not.
    """
    height, width, channels = pixels.shape
    padded = F.pad(pixels, (0, 0, 0, -width % patch_size, 0, -height % patch_size))
    grid = padded.reshape(-(-height // patch_size), patch_size, -(-width // patch_size), patch_size, channels)
    return grid.permute(0, 2, 4, 1, 3).reshape(-1, channels * patch_size * patch_size)


def patch_extents(resized: tuple[int, int], patch_size: int) -> np.ndarray:
    """Rows and columns of every patch inside an image of (width, height), row-major. int32 [num_patches, 2]."""
    columns, rows = (
        np.minimum(length - np.arange(0, length, patch_size, dtype=np.int32), patch_size) for length in resized
    )
    return np.stack(np.broadcast_arrays(rows[:, None], columns[None, :]), axis=-1).reshape(-1, 2)


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
