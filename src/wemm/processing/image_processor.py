"""Resize rule, token count and normalisation of the original's image processor, bit for bit."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from wemm.config import ImageConfig, ModelConfig

NUM_SEPARATORS_PER_IMAGE = 2
"""Separator rows 0 and 1 enclose the grid tokens of an image."""


@dataclass(frozen=True)
class ImagePlan:
    """What an image becomes, from its width and height alone."""

    resized: tuple[int, int]
    """(width, height) after the resize."""
    patch_grid: tuple[int, int]
    """(rows, columns) of vision-tower patches."""
    token_grid: tuple[int, int]
    """(rows, columns) after the downsampler."""

    @property
    def num_patches(self) -> int:
        """Vision-tower sequence length."""
        return self.patch_grid[0] * self.patch_grid[1]

    @property
    def num_tokens(self) -> int:
        """Prompt positions, separators included."""
        return self.token_grid[0] * self.token_grid[1] + NUM_SEPARATORS_PER_IMAGE


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
        self._image = config.image
        self._patch_size = config.vision.patch_size
        self._kernel_size = config.downsampler.kernel_size

    def plan(self, width: int, height: int) -> ImagePlan:
        """Cost of an image of `width` x `height` pixels, without decoding it."""
        resized = resized_size(width, height, self._image)
        patch_grid = (-(-resized[1] // self._patch_size), -(-resized[0] // self._patch_size))
        token_grid = (-(-patch_grid[0] // self._kernel_size), -(-patch_grid[1] // self._kernel_size))
        return ImagePlan(resized, patch_grid, token_grid)

    def process(self, image: Image.Image) -> ProcessedImage:
        """Resize an RGB image. Bilinear with antialiasing on uint8, as PIL does it."""
        plan = self.plan(image.width, image.height)
        pixels = np.array(image.resize(plan.resized, Image.Resampling.BILINEAR))
        digest = hashlib.sha256(f"{pixels.shape}".encode())
        digest.update(pixels.tobytes())
        return ProcessedImage(torch.from_numpy(pixels), plan, digest.hexdigest())


def resized_size(width: int, height: int, config: ImageConfig) -> tuple[int, int]:
    """(width, height) after the resize: the long edge becomes `longest_edge`, up or down.

    Double precision and `int()` truncation on purpose: some exact results come out one pixel
    short, and the reference has them so (reference 2.3).
    """
    if config.fixed_size is not None:
        return config.fixed_size[1], config.fixed_size[0]
    aspect_ratio = width / height
    if width >= height:
        new_width, new_height = config.longest_edge, int(config.longest_edge / aspect_ratio)
    else:
        new_width, new_height = int(config.longest_edge * aspect_ratio), config.longest_edge
    return max(new_width, config.shortest_edge), max(new_height, config.shortest_edge)


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
