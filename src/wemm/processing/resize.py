"""Resize rule and token count of the original's image processor, without torch.

Apart from image_processor.py because it also runs in the processes that decode the images of strangers.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from wemm.config import ImageConfig, ModelConfig
from wemm.errors import PromptError

NUM_SEPARATORS_PER_IMAGE = 2
"""Separator rows 0 and 1 enclose the grid tokens of an image."""

DETAILS = ("auto", "low", "high")


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


def image_config_for(detail: str, config: ModelConfig) -> ImageConfig:
    """The resize rule of one level of detail. "high" and "auto": the model's own. Raises PromptError.

    "low" halves both edges, and with them about a quarter of the tokens is left. The shortest edge is rounded
    down to whole tokens where it has one, so that no token of a narrow image is mostly padding. A model of one
    fixed size has one detail.
    """
    if detail not in DETAILS:
        raise PromptError(f"detail must be {', '.join(DETAILS[:-1])} or {DETAILS[-1]}. Given: {detail!r:.100}")
    image = config.image
    if detail != "low" or image.fixed_size is not None:
        return image
    token_edge = config.vision.patch_size * config.downsampler.kernel_size
    shortest_edge = image.shortest_edge // 2
    if shortest_edge >= token_edge:
        shortest_edge -= shortest_edge % token_edge
    return replace(image, shortest_edge=max(shortest_edge, 1), longest_edge=max(image.longest_edge // 2, 1))


def plan_image(width: int, height: int, config: ModelConfig, detail: str = "auto") -> ImagePlan:
    """Cost of an image of `width` x `height` pixels, without decoding it. Raises PromptError."""
    return plan_resized(resized_size(width, height, image_config_for(detail, config)), config)


def plan_resized(resized: tuple[int, int], config: ModelConfig) -> ImagePlan:
    """Cost of an image that already has its final (width, height)."""
    patch_size, kernel_size = config.vision.patch_size, config.downsampler.kernel_size
    patch_grid = (-(-resized[1] // patch_size), -(-resized[0] // patch_size))
    token_grid = (-(-patch_grid[0] // kernel_size), -(-patch_grid[1] // kernel_size))
    return ImagePlan(resized, patch_grid, token_grid)


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


def resize_image(image: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """An RGB image at `size`, which is (width, height). Bilinear with antialiasing, as PIL does it.

    uint8 [height, width, 3].
    """
    return np.array(image.resize(size, Image.Resampling.BILINEAR))


def hash_pixels(pixels: np.ndarray) -> str:
    """SHA-256 of resized pixels and their shape, in hexadecimal: equal hashes mean equal embeddings."""
    digest = hashlib.sha256(f"{pixels.shape}".encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()
