"""Seeded requests for benchmarks: questions about drawn pictures of a given size, or about one of the user's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from wemm.errors import ParameterError
from wemm.processing.chat_template import Message
from wemm.processing.media import open_image

_WORDS = ("what", "is", "written", "here", "how", "many", "are", "there", "left", "of", "the", "large", "one")


@dataclass(frozen=True)
class Workload:
    """What is asked."""

    num_requests: int
    image_size: tuple[int, int] | None
    """(width, height); None: text only."""
    num_images: int
    """Different images, asked about in turn."""
    prompt_words: int
    seed: int
    image_file: Path | None = None
    """This picture in every request instead of drawn ones."""
    prompt: str | None = None
    """This question instead of drawn words."""

    def conversations(self) -> list[Sequence[Message]]:
        """One per request; every drawn question is different."""
        rng = np.random.default_rng(self.seed)
        images: list[Any] = [str(self.image_file)] if self.image_file else []
        if self.image_size and not images:
            images = [self._image(rng) for _ in range(self.num_images)]
        return [self._conversation(rng, images, i) for i in range(self.num_requests)]

    def pixels(self) -> tuple[int, int] | None:
        """(width, height) of the images; None: text only. Raises MediaError if the file is no image."""
        return open_image(self.image_file).size if self.image_file else self.image_size

    def settings(self) -> dict[str, Any]:
        """The fields, ready for JSON."""
        size = self.pixels()
        return {
            **asdict(self),
            "image_size": f"{size[0]}x{size[1]}" if size else "none",
            "image_file": str(self.image_file) if self.image_file else None,
        }

    def _image(self, rng: np.random.Generator) -> Image.Image:
        assert self.image_size is not None
        width, height = self.image_size
        noise = rng.integers(0, 256, (max(1, height // 8), max(1, width // 8), 3), dtype=np.uint8)
        return Image.fromarray(noise).resize((width, height))

    def _conversation(self, rng: np.random.Generator, images: Sequence[Any], i: int) -> list[dict[str, Any]]:
        text = self.prompt or " ".join([f"{i}:", *rng.choice(_WORDS, self.prompt_words)])
        parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
        if images:
            parts.insert(0, {"type": "image", "image": images[i % len(images)]})
        return [{"role": "user", "content": parts}]


def parse_size(text: str) -> tuple[int, int] | None:
    """`640x480` → (640, 480); `none` → None. Raises ParameterError."""
    if text == "none":
        return None
    width, cross, height = text.partition("x")
    if not (cross and width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise ParameterError(f"an image size is written like 640x480, or none for text alone. Given: {text!r}")
    return int(width), int(height)
