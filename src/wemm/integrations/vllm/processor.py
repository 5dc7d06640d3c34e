"""Images on their way into vLLM: our image path, and hashes of what it reads.

The processor keeps resized pixels as uint8; they are normalised where the tower runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import BatchFeature
from vllm.exceptions import VLLMValidationError
from vllm.inputs import MultiModalDataDict
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.media import MediaWithBytes
from vllm.multimodal.parse import ImageProcessorItems, ModalityDataItems, MultiModalDataItems, MultiModalDataParser
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
    PromptUpdate,
)

from wemm.errors import ClientError
from wemm.processing.image_processor import ImageProcessor
from wemm.processing.media import open_image
from wemm.processing.resize import plan_resized

_KWARGS = ("detail", "reference_image_mode")


class WemmProcessingInfo(BaseProcessingInfo):
    """What vLLM asks before it sees an image."""

    @property
    def image_processor(self) -> ImageProcessor:
        """The rules of this checkpoint."""
        return ImageProcessor(self.get_hf_config().model_config)

    @property
    def largest_image(self) -> tuple[int, int]:
        """(width, height) of what becomes the most tokens."""
        image = self.get_hf_config().model_config.image
        if image.fixed_size is not None:
            return image.fixed_size[1], image.fixed_size[0]
        return image.longest_edge, image.longest_edge

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """As many images as fit."""
        return {"image": None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        """From the configuration alone."""
        return {"image": self.image_processor.plan(*self.largest_image).num_tokens}

    def get_data_parser(self) -> MultiModalDataParser:
        """Which opens images as our engine does; `reference_image_mode` is the engine's, not a request's."""
        kwargs = self.ctx.get_mm_config().mm_processor_kwargs or {}
        return _ImageParser(bool(kwargs.get("reference_image_mode", False)))


class _ImageParser(MultiModalDataParser):
    """Every image becomes upright RGB before it is hashed: what is not in its pixels cannot matter later."""

    def __init__(self, reference_image_mode: bool) -> None:
        super().__init__()
        self._reference_image_mode = reference_image_mode

    def _parse_image_data(self, data: Any) -> ModalityDataItems[Any, Any] | None:
        if data is None:
            return None
        if isinstance(data, (Image.Image, MediaWithBytes, np.ndarray)):
            data = [data]
        return ImageProcessorItems([None if image is None else self._open(image) for image in data])

    def _open(self, image: Any) -> Image.Image:
        if isinstance(image, MediaWithBytes):
            image = image.original_bytes
        elif isinstance(image, np.ndarray):
            image = Image.fromarray(image)
        if not isinstance(image, (Image.Image, bytes)):  # a path least of all: nobody has allowed it
            raise VLLMValidationError(f"not an image: {type(image).__name__}", parameter="image")
        try:
            opened = open_image(image, self._reference_image_mode)
        except ClientError as error:
            raise VLLMValidationError(str(error), parameter="image") from None
        return Image.fromarray(np.asarray(opened))  # and nothing but pixels


class WemmDummyInputs(BaseDummyInputsBuilder[WemmProcessingInfo]):
    """What memory is planned with."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """None: a placeholder is no text."""
        return ""

    def get_dummy_mm_data(
        self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Mapping[str, Any]
    ) -> MultiModalDataDict:
        """The largest images."""
        width, height = self.info.largest_image
        images = self._get_dummy_images(
            width=width, height=height, num_images=mm_counts.get("image", 0), overrides=mm_options.get("image")
        )
        return {"image": images}


class WemmProcessor(BaseMultiModalProcessor[WemmProcessingInfo]):
    """`mm_processor_kwargs`: `detail` (auto, high or low), per request or for the engine."""

    def get_dummy_inputs(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> Any:
        """With placeholders in the prompt, which no text spells."""
        inputs = super().get_dummy_inputs(seq_len, mm_counts, mm_options)
        inputs.prompt = [self.info.get_hf_config().image_token_id] * mm_counts.get("image", 0)
        return inputs

    def _call_hf_processor(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, Any]) -> BatchFeature:
        kwargs = self.info.ctx.get_merged_mm_kwargs(hf_kwargs)
        unknown = [key for key in kwargs if key not in _KWARGS]
        if unknown:
            raise VLLMValidationError(
                f"mm_processor_kwargs may hold {' and '.join(_KWARGS)}. Given: {', '.join(unknown)}",
                parameter="mm_processor_kwargs",
            )
        processor = self.info.image_processor
        try:
            images = [processor.process(image, kwargs.get("detail", "auto")) for image in hf_data["images"]]
        except ClientError as error:
            raise VLLMValidationError(str(error), parameter="mm_processor_kwargs") from None
        return BatchFeature({"pixels": [image.pixels for image in images]})

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        return {"pixels": MultiModalFieldConfig.batched("image")}

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        config = self.info.get_hf_config()
        image_token_id, model_config = config.image_token_id, config.model_config

        def tokens(index: int) -> list[int]:
            pixels = out_mm_kwargs["image"][index]["pixels"].data
            assert isinstance(pixels, torch.Tensor)
            height, width = pixels.shape[:2]
            return [image_token_id] * plan_resized((width, height), model_config).num_tokens

        return [PromptReplacement("image", [image_token_id], tokens)]
